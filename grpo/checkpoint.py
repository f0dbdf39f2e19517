"""Export of the trained policy as an ordinary Hugging Face folder."""

import copy
from pathlib import Path

import torch

from grpo.policy import Policy


def export_policy(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Weights (safetensors), tokenizer, image processor. Opens with from_pretrained and needs nothing of ours.

    The checkpoint's own generation_config comes along as it was.
    """
    model = policy.model if policy.model.dtype == dtype else copy.deepcopy(policy.model).to(dtype)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    policy.image_processor.save_pretrained(folder)
