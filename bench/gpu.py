"""Ours alone on a GPU, on the shapes of Qwen2.5-VL-3B and Qwen2.5-3B: how near the hardware's
limits each phase is.

    python bench/gpu.py                # one GPU of 80 GB
    python bench/gpu.py --smoke        # tiny shapes, on whatever there is: only shows that it runs

Random weights in bfloat16; no caption ends early. Decoding is compared with the time that reading
weights and cache takes at the measured bandwidth, the passes with the measured rate of a large
matrix product. The optimizer is SGD without state: masters, moments and their sharding are not in
this measurement. Checkpointing computes a forward pass twice, which is not counted as work.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.examples import Example, Question
from data.toy.tokenizer import build_tokenizer
from grpo.config import RewardConfig, toy_config
from grpo.distributed import cast_weights_, local_device
from grpo.logprobs import CompletionScorer
from grpo.pretrained import make_policy
from grpo.rollout import Rollouts, sample_rollouts
from grpo.update import prepare_training_, update_policy
from reward.caprl import Verifier, caption_rewards


@dataclass(frozen=True)
class GpuConfig:
    """Sizes of the measurement."""

    prompts: int = 16
    group_size: int = 8
    tokens: int = 512
    side: int = 896
    """Side of the square images, in pixels: 1,024 tokens."""
    hidden: int = 2048
    intermediate: int = 11008
    layers: int = 36
    heads: int = 16
    vocab: int = 151936
    vision_hidden: int = 1280
    vision_layers: int = 32
    micro_batch_tokens: int = 16_384
    ceiling_side: int = 8192
    """Side of the square matrices whose product is the measure of arithmetic."""
    repeats: int = 3
    smoke: bool = False


SMOKE = dict(prompts=2, group_size=2, tokens=6, side=112, hidden=64, intermediate=96, layers=2,
             heads=2, vocab=1024, vision_hidden=32, vision_layers=2, ceiling_side=128, repeats=1)


def build_models(config: GpuConfig, device: torch.device):
    """Policy, its reference and verifier with random weights, in bfloat16."""
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    half = config.hidden // config.heads // 2
    side = half * 3 // 8
    text = dict(
        vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768, bos_token_id=None, eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    of_policy = Qwen2_5_VLConfig(
        text_config=text | dict(
            rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                 mrope_section=[half - 2 * side, side, side])
        ),
        vision_config=dict(
            depth=config.vision_layers, hidden_size=config.vision_hidden,
            intermediate_size=config.vision_hidden * 171 // 64,
            num_heads=max(1, config.vision_hidden // 80), patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=112, fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=config.hidden,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        models = [Qwen2_5_VLForConditionalGeneration(of_policy).eval() for _ in range(2)]
        models.append(Qwen2ForCausalLM(Qwen2Config(**text)).eval())
    for model in models:
        cast_weights_(model, torch.bfloat16)
    pixels = Qwen2VLImageProcessorPil()
    policy, reference = (make_policy(model, tokenizer, pixels) for model in models[:2])
    never = tuple(sorted({*policy.forbidden_ids, *policy.eos_ids}))
    reference.model.requires_grad_(False)
    return replace(policy,
                   forbidden_ids=never), reference, Verifier(models[2].requires_grad_(False),
                                                             tokenizer, mode="sample")


def seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The best of `repeats`, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measure_limits(config: GpuConfig, device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy, both ways counted; floating-point operations per second of a
    bfloat16 product."""
    side = config.ceiling_side
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    bandwidth = 2 * a.nbytes / seconds(lambda: b.copy_(a), 10 * config.repeats, device)
    return bandwidth, 2 * side**3 / seconds(lambda: a @ b, config.repeats, device)


def decoding_bytes(policy, rollouts: Rollouts) -> float:
    """What one step must read, in the mean: the text model's weights, prompts once a group, half of
    each full caption."""
    text = policy.model.config.get_text_config()
    # with the head, which is tied
    weights = sum(p.nbytes for p in policy.model.model.language_model.parameters())
    if policy.model.lm_head.weight is not policy.model.model.language_model.embed_tokens.weight:
        weights += policy.model.lm_head.weight.nbytes
    head_dim = text.hidden_size // text.num_attention_heads
    of_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
    of_token *= policy.model.dtype.itemsize
    tokens = sum(len(prompt.input_ids) for prompt in rollouts.prompts)
    tokens += rollouts.lengths.sum().item() / 2
    return weights + tokens * of_token


def training_work(policy, rollouts: Rollouts) -> float:
    """Floating-point operations of forward and backward: 6 for each weight and token, 12 for each
    pair and width of attention in the language model; attention of the vision tower, mostly in
    windows, is left out."""
    text = policy.model.config.get_text_config()
    linear = sum(p.numel() for p in policy.model.model.language_model.layers.parameters())
    visual = sum(p.numel() for p in policy.model.model.visual.parameters())
    captions = rollouts.lengths.view(len(rollouts.prompts), -1).tolist()
    total = 0.0
    for prompt, lengths in zip(rollouts.prompts, captions):
        width = len(prompt.input_ids)
        pairs = width**2 / 2 + sum(width * length + length**2 / 2 for length in lengths)
        total += 6 * linear * (width + sum(lengths))
        total += 6 * policy.model.lm_head.weight.numel() * sum(lengths)
        total += 12 * pairs * text.hidden_size * text.num_hidden_layers
        total += 6 * visual * len(prompt.pixel_values)
    return total


def main(config: GpuConfig) -> None:
    if config.smoke:
        config = replace(config, **SMOKE)
    device = local_device()
    if device.type == "cpu" and not config.smoke:
        raise SystemExit("error: expected a GPU, found none; --smoke runs tiny shapes anywhere")
    policy, reference, verifier = build_models(config, device)
    bandwidth, arithmetic = measure_limits(config, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {bandwidth / 1e9:.0f} GB/s copied, {arithmetic / 1e12:.2f} TFLOP/s in a "
          f"product of {config.ceiling_side}")

    settings = toy_config(group_size=config.group_size, max_new_tokens=config.tokens,
                          prompts_per_step=config.prompts,
                          micro_batch_tokens=config.micro_batch_tokens, gradient_checkpointing=True,
                          kl_coef=0.04)
    prepare_training_(policy.model, settings)
    score = dict(pad_id=policy.pad_id, forbidden_ids=policy.forbidden_ids)
    scorer, frozen = CompletionScorer(policy.model,
                                      **score), CompletionScorer(reference.model, **score)
    optimizer = torch.optim.SGD(scorer.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (config.prompts, 8, 8, 3), generator=generator,
                          dtype=torch.uint8).numpy()
    images = [Image.fromarray(pixels).resize((config.side, config.side)) for pixels in noise]
    names = ("circle", "square", "star", "bar")
    questions = tuple(Question(f"What color is the {name}?", ("red", "blue"), 0) for name in names)
    examples = [Example(str(place), image, questions) for place, image in enumerate(images)]
    prompts = [policy.prompt(image) for image in images]
    keys = [str(place) for place in range(config.prompts * config.group_size)]
    caption = ("The first bar is red." + " red" * config.tokens)[: 4 * config.tokens]
    by_caption = [example for example in examples for _ in range(config.group_size)]

    def roll(tokens: int = config.tokens) -> Rollouts:
        return sample_rollouts(policy, prompts, keys, tokens)

    def verify() -> None:
        asking = RewardConfig(num_questions=len(questions))
        names = [example.id for example in by_caption]
        caption_rewards([caption] * len(keys), by_caption, names, [0] * len(keys), verifier, asking)

    rollouts = roll()
    parts = [rollouts.groups(place, place + 1) for place in range(config.prompts)]
    advantages, valid = torch.randn(len(keys),
                                    device=device), torch.ones(len(keys), dtype=torch.bool,
                                                               device=device)

    @torch.no_grad()
    def refer() -> None:
        for part in parts:
            frozen(part)

    def update() -> None:
        update_policy(scorer, None, optimizer, rollouts, advantages, valid, settings)

    spent, memory = {}, {}
    for phase, function in (("first token", lambda: roll(1)), ("rollout", roll),
                            ("verifier", verify),
                            ("reference pass", refer), ("forward + backward", update)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        spent[phase] = seconds(function, config.repeats, device)
        memory[phase] = "not measured"
        if device.type == "cuda":
            memory[phase] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    print("| phase | seconds | peak GiB |\n| --- | ---: | ---: |")
    for phase, taken in spent.items():
        print(f"| {phase} | {taken:.3f} | {memory[phase]} |")
    # that is a part of the rollout
    whole = sum(taken for phase, taken in spent.items() if phase != "first token")
    print(f"| whole step | {whole:.3f} | |")

    steps = max(spent["rollout"] - spent["first token"], 1e-9) / (config.tokens - 1)
    bound = decoding_bytes(policy, rollouts) / bandwidth
    decoded, allowed = len(keys) / steps, len(keys) / bound
    print(f"decoding: {decoded:.0f} tokens/s, {decoded / allowed:.0%} of the {allowed:.0f} that "
          "bandwidth allows")
    rate = training_work(policy, rollouts) / spent["forward + backward"]
    print(f"forward + backward: {rate / 1e12:.2f} TFLOP/s, {rate / arithmetic:.0%} of the "
          "product's")


if __name__ == "__main__":
    main(tyro.cli(GpuConfig))
