"""Whether a verifier answers a question the same alone and in a batch."""

import torch
from transformers import PreTrainedModel

from reward.caprl import PromptWriter, letter_logits, question_rows_, run_head, run_rows_


@torch.no_grad()
def check_rows(model: PreTrainedModel, writer: PromptWriter) -> None:
    """Raises ValueError if two short rows end in other hidden states in a batch than each alone.
    They are run as `Verifier` runs them. The answers of such a model on one caption would
    depend on the captions beside it."""
    # Lengths that `pad_left` does not round up: the longest row must be without padding.
    head, text = writer.head_ids[-16:], model.config.get_text_config()
    # Longer than the windows of local attention, which is 256 tokens in GPT-Neo.
    num_tokens = min(768, getattr(text, "max_position_embeddings", None) or 768) // 64 * 32
    long = writer.caption_ids("A red square. A blue star. " * 100)[-num_tokens:]
    captions = [writer.caption_ids("A red square."), long]
    questions = [[writer.tail_ids], [(writer.middle_ids * 48 + writer.tail_ids)[-48:]]]
    name, wanted = type(model).__name__, "expected layers that padding and a cache do not disturb"
    try:
        rows = question_rows_(model, head, captions, questions, run_head(model, head))
        hidden, _, _ = run_rows_(model, *rows)
        prompts = [head + caption + row for caption, [row] in zip(captions, questions)]
        whole = [torch.tensor([ids], device=model.device) for ids in prompts]
        outputs = [model.base_model(ids, use_cache=False) for ids in whole]
        alone = [output.last_hidden_state[0, -1].float() for output in outputs]
        logits = model(whole[0], use_cache=False).logits[0, -1, writer.letter_ids].float()
        ours = letter_logits(model, outputs[0].last_hidden_state[:, -1], writer.letter_ids)[0]
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{wanted}, {name} fails with them: {error}") from None
    pairs = zip(hidden[:, -1].float(), alone)
    padded, longest = ((row - states).norm() / states.norm() for row, states in pairs)
    # The longest row has no padding. So its difference shows how much is rounding, in any dtype. It
    # may be 0 by luck, where half precision takes 1% off the other row.
    most = torch.finfo(model.dtype).eps ** 0.5
    if not (longest <= most and padded <= max(8 * longest, most)):
        error = max(padded.item(), longest.item())
        raise ValueError(f"{wanted}, {name}'s states come out {error:.1g} apart")
    error = (ours - logits).abs().max() / logits.abs().max()
    if not error <= most:
        raise ValueError(f"expected logits of the head, scaled or capped as in Gemma, Granite and "
                         f"Cohere, {name}'s come out {error:.1g} apart")
