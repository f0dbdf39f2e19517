"""The toy policy: a Qwen2.5-VL of about two million parameters, warmed up to caption as a weak
captioner does.

First it learns to see, on captions that state every fact. Then it learns to talk, on captions that
are mostly sparse and sometimes dense or wrong. What reinforcement learning has to find afterwards
is within it, but rare.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.toy.fit import INITIALIZER_RANGE, fit
from data.toy.world import FAMILIES, Scene, draw, make_scene, perturb, write_caption
from grpo.logprobs import CompletionScorer
from grpo.policy import CAPTION_INSTRUCTION, Policy
from grpo.pretrained import make_policy
from grpo.rollout import Rollouts

SEEING = 0.75
"""Share of the steps on captions that state every fact."""

SHARPNESS = 0.7
"""So small a model leaves 3% of its captions malformed; a real captioner does not. Sharpened, under
1% are left."""
FAMILY_SHARES = (4, 2, 4)
"""Shapes, bars, cards: bars are learnt several times as fast."""


def build_policy(tokenizer: PreTrainedTokenizerBase, seed: int) -> Policy:
    """A policy with random weights; its image processor takes images of 56 x 56 to 224 x 224 pixels
    unscaled."""
    torch.manual_seed(seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
            bos_token_id=None, initializer_range=INITIALIZER_RANGE,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                             "mrope_section": [8, 12, 12]},
            eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=dict(
            depth=4, hidden_size=128, intermediate_size=256, num_heads=4, patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1, 3],
            out_hidden_size=128, initializer_range=INITIALIZER_RANGE,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224})
    return make_policy(model, tokenizer, processor)


def weak_caption(scene: Scene, rng: random.Random) -> str:
    """Mostly a few of the facts, sometimes all of them, now and then with mistakes."""
    facts = perturb(scene.facts, 0.3, rng) if rng.random() < 0.2 else list(scene.facts)
    kept = rng.choice((0.15, 0.25, 0.25, 0.4, 0.4, 0.6, 1.0))
    return write_caption(scene.family, [f for f in facts if rng.random() < kept] or facts[:1])


def as_rollouts(policy: Policy, scenes: Sequence[Scene], captions: Sequence[str],
                instruction: str = CAPTION_INSTRUCTION) -> Rollouts:
    """Given texts, one per scene, as rollouts for the scorer. Each ends with EOS; none is
    sampled."""
    rows = [policy.tokenizer.encode(c, add_special_tokens=False) + [policy.tokenizer.eos_token_id]
            for c in captions]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True,
                                             padding_value=policy.pad_id)
    prompts = [policy.prompt(draw(scene), instruction) for scene in scenes]
    never = torch.zeros(len(rows), dtype=torch.bool)
    return Rollouts(prompts, tokens, lengths, torch.zeros(tokens.shape), never, list(captions))


def train_policy(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int,
                 batch: int = 32) -> Policy:
    policy = build_policy(tokenizer, seed)
    scorer = CompletionScorer(policy.model, policy.pad_id, policy.forbidden_ids)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"policy:{seed}:{step}")
        families = rng.choices(range(len(FAMILIES)), FAMILY_SHARES, k=batch)
        scenes = [make_scene("train", rng.randrange(10**6) * len(FAMILIES) + family)
                  for family in families]
        if step < SEEING * steps:
            captions = [write_caption(scene.family, scene.facts) for scene in scenes]
        else:
            captions = [weak_caption(scene, rng) for scene in scenes]
        rollouts = as_rollouts(policy, scenes, captions)
        logprobs, _ = scorer(rollouts)  # (B, L)
        return -logprobs.sum() / rollouts.lengths.sum(), {}

    fit(policy.model, loss_at, steps, "policy", warmup_share=0.05, decay_share=1 / 3)
    sharpen_(policy)
    return policy


def sharpen_(policy: Policy) -> None:
    """Makes sampling at temperature 1 what sampling at SHARPNESS was, by the scale of the last
    norm."""
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.div_(SHARPNESS)
