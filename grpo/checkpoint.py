"""Export of the trained policy as an ordinary Hugging Face folder."""

from pathlib import Path

import torch

from grpo.policy import Policy


def export_policy(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Weights (safetensors), tokenizer, image processor. Opens with from_pretrained and needs nothing of ours.

    The checkpoint's own generation settings come along, but sampling is off: whoever samples says how.
    """
    weights = {name: value.to(dtype) for name, value in policy.model.state_dict().items()}
    if policy.model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    policy.model.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
