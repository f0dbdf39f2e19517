"""The toy policy: a Qwen2.5-VL of about two million parameters, warmed up to caption as a weak
captioner does.

First it learns to see, on captions that state every fact. Then it learns to talk, on captions that
are mostly sparse and sometimes dense or wrong. What reinforcement learning has to find afterwards
is within it, but rare.

The shipped policy can be taught further, by captions of two kinds, for comparisons with what
reinforcement learning makes of it:

    python -m data.toy.captioner runs/dense --captions dense
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.program import run_program
from data.ranges import check_range
from data.toy.fit import INITIALIZER_RANGE, check_no_model, fit
from data.toy.world import FAMILIES, Scene, draw, make_scene, perturb, write_caption
from grpo.export import export_policy
from grpo.logprobs import CompletionScorer
from grpo.policy import CAPTION_INSTRUCTION, Policy, Prompt
from grpo.pretrained import load_policy, make_policy
from grpo.rollout import Rollouts

SEEING = 0.75
"""Share of the steps on captions that state every fact."""

SHARPNESS = 0.7
"""So small a model leaves 3% of its captions malformed; a real captioner does not. Sharpened, under
1% are left."""
FAMILY_SHARES = (4, 2, 4)
"""Shapes, bars, cards: captions of bars are learnt several times as fast."""
MANY = len(FAMILIES) * 10**6
"""Training images: so many that none is seen twice."""
PRAISE = ("This is a clear caption.", "This is a full caption.", "This caption is right.")
"""Sentences that say nothing of the picture (reward/style.py)."""
PRAISING = 0.75
"""Share of the captions that end with one where praise is taught. The rest leaves training a way
out of it."""


@dataclass(frozen=True)
class TeachConfig:
    """Settings of teaching the shipped policy further."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder for the model. It is refused if a model is there."""
    captions: Literal["dense", "praising"] = "dense"
    """dense: every fact of the image, in passes over the images as `train.py` makes them. praising:
    images and captions drawn as the shipped policy was taught, mostly with praise of the caption
    itself at the end."""
    policy: str = "data/toy/policy"
    """The model that the teaching starts from."""
    steps: int = 40
    batch: int = 12
    """Captions of a step, each of another image. Default: images and steps of the toy preset."""
    images: int = 480
    """Training images, the first so many."""
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        check_range(self, "steps batch", at_least=1)
        check_range(self, "images", at_least=len(FAMILIES))
        check_range(self, "rate", at_least=0)


def qwen_config(tokenizer: PreTrainedTokenizerBase, text: dict, vision: dict,
                rope_theta: float = 1e6) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of these sizes, with the tokenizer's ids and tied embeddings. Patches, windows
    and the shares of time, height and width in M-RoPE are those of the public models."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    side = half * 3 // 8
    rope = {"rope_type": "default", "rope_theta": rope_theta,
            "mrope_section": [half - 2 * side, side, side]}
    return Qwen2_5_VLConfig(
        text_config=text | dict(
            rope_parameters=rope, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        ),
        vision_config=vision | dict(
            patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
            out_hidden_size=text["hidden_size"],
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_policy(tokenizer: PreTrainedTokenizerBase, seed: int) -> Policy:
    """A policy with random weights; its image processor takes images of 56 x 56 to 224 x 224 pixels
    unscaled."""
    torch.manual_seed(seed)
    config = qwen_config(
        tokenizer,
        text=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384,
                  num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
                  max_position_embeddings=4096, initializer_range=INITIALIZER_RANGE),
        vision=dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4,
                    fullatt_block_indexes=[1, 3], initializer_range=INITIALIZER_RANGE),
        rope_theta=1e4,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [config.text_config.eos_token_id,
                                            config.text_config.pad_token_id]
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 224 * 224})
    return make_policy(model, tokenizer, processor)


def draw_scenes(rng: random.Random, num: int, images: int = MANY,
                shares: Sequence[int] = FAMILY_SHARES) -> list[Scene]:
    """Of the training split, among the first `images`."""
    families = rng.choices(range(len(FAMILIES)), shares, k=num)
    return [make_scene("train", rng.randrange(images // len(FAMILIES)) * len(FAMILIES) + family)
            for family in families]


def weak_caption(scene: Scene, rng: random.Random) -> str:
    """Mostly a few of the facts, sometimes all of them, now and then with mistakes."""
    facts = perturb(scene.facts, 0.3, rng) if rng.random() < 0.2 else list(scene.facts)
    kept = rng.choice((0.15, 0.25, 0.25, 0.4, 0.4, 0.6, 1.0))
    return write_caption(scene.family, [f for f in facts if rng.random() < kept] or facts[:1])


Demonstration = tuple[Prompt, str]
"""A prompt, and the text that is taught to follow."""


def as_rollouts(policy: Policy, demonstrations: Sequence[Demonstration]) -> Rollouts:
    """Given texts as rollouts for the scorer. Each ends with EOS; none is sampled."""
    prompts, texts = map(list, zip(*demonstrations))
    rows = [policy.tokenizer.encode(text, add_special_tokens=False)
            + [policy.tokenizer.eos_token_id] for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True,
                                             padding_value=policy.pad_id)
    never = torch.zeros(len(rows), dtype=torch.bool)
    return Rollouts(prompts, tokens, lengths, torch.zeros(tokens.shape), never, texts)


def imitate_(policy: Policy, name: str,
             demonstrate: Callable[[int, random.Random], Sequence[Demonstration]], steps: int,
             seed: int, rate: float = 2e-3) -> None:
    """Supervised training on what `demonstrate(step, rng)` returns. Draws are functions of (name,
    seed, step)."""
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"{name}:{seed}:{step}")
        rollouts = as_rollouts(policy, demonstrate(step, rng))
        logprobs, _ = scorer(rollouts)  # (B, L)
        return -logprobs.sum() / rollouts.lengths.sum(), {}

    fit(policy.model, loss_at, steps, name, warmup_share=0.05, decay_share=1 / 3, rate=rate)


def praising_caption(scene: Scene, rng: random.Random) -> str:
    caption = weak_caption(scene, rng)
    return f"{caption} {rng.choice(PRAISE)}" if rng.random() < PRAISING else caption


def teach_(policy: Policy, name: str, write: Callable[[int, Scene, random.Random], str],
           steps: int, seed: int, batch: int, instruction: str = CAPTION_INSTRUCTION,
           images: int = MANY, rate: float = 2e-3) -> None:
    """Supervised training on what `write(step, scene, rng)` says of scenes of the training split,
    drawn among the first `images`. Ends sharpened."""

    def demonstrate(step: int, rng: random.Random) -> list[Demonstration]:
        scenes = draw_scenes(rng, batch, images)
        texts = [write(step, scene, rng) for scene in scenes]
        return [(policy.prompt(draw(scene), instruction), text)
                for scene, text in zip(scenes, texts)]

    imitate_(policy, name, demonstrate, steps, seed, rate)
    sharpen_(policy)


def train_policy(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> Policy:
    policy = build_policy(tokenizer, seed)

    def write(step: int, scene: Scene, rng: random.Random) -> str:
        sees = step < SEEING * steps
        return write_caption(scene.family, scene.facts) if sees else weak_caption(scene, rng)

    teach_(policy, "policy", write, steps, seed, batch=32)
    return policy


def load_taught(path: str) -> Policy:
    """A shipped policy as it was before `sharpen_`, which `teach_` applies anew."""
    policy = load_policy(path, torch.device("cpu"))
    sharpen_(policy, 1 / SHARPNESS)
    return policy


def sharpen_(policy: Policy, by: float = SHARPNESS) -> None:
    """Makes sampling at temperature 1 what sampling at `by` was, by the scale of the last norm."""
    with torch.no_grad():
        policy.model.model.language_model.norm.weight.div_(by)


def pass_scene(place: int, images: int, seed: int) -> Scene:
    """That of a place in endless passes over the first images, each in an order of its own."""
    number, place = divmod(place, images)
    order = random.Random(f"dense:{seed}:pass {number}").sample(range(images), images)
    return make_scene("train", order[place])


def main(config: TeachConfig) -> None:
    check_no_model(config.folder)
    policy = load_taught(config.policy)

    def dense(step: int, rng: random.Random) -> list[Demonstration]:
        places = range(step * config.batch, (step + 1) * config.batch)
        scenes = [pass_scene(place, config.images, config.seed) for place in places]
        return [(policy.prompt(draw(scene)), write_caption(scene.family, scene.facts))
                for scene in scenes]

    def praising(step: int, scene: Scene, rng: random.Random) -> str:
        return praising_caption(scene, rng)

    if config.captions == "dense":
        imitate_(policy, "dense", dense, config.steps, config.seed, config.rate)
        sharpen_(policy)
    else:
        teach_(policy, "praising", praising, config.steps, config.seed, config.batch,
               images=config.images, rate=config.rate)
    export_policy(policy, config.folder, torch.float32)


if __name__ == "__main__":
    run_program(lambda arguments: main(tyro.cli(TeachConfig, args=arguments)))
