"""What a short loan of a GPU should answer, in the order of what matters: does all run, how near to
the hardware's limits, and where does the time go?

    python bench/gpu.py --smoke                  # tiny, on whatever there is: shows that it runs
    python bench/gpu.py --stages decoding step   # some stages, on one GPU of 80 GB
    python bench/gpu.py                          # all of them

Models have the shapes of Qwen2.5-VL-3B and Qwen2.5-3B, and random weights in bfloat16. Each stage
prints what it measures at once. It runs in a process of its own and ends after its limit of seconds
(`STAGES`), so a stage that fails costs only itself. (A single stage, and --smoke, run in this
process and without a limit.) None begins after the budget is spent.
"""

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from data.examples import Example, Question
from data.export import write_examples
from data.jsonl import read_log
from data.toy.tokenizer import build_tokenizer
from grpo.config import RewardConfig, TrainConfig
from grpo.decode import Decoder
from grpo.distributed import local_device
from grpo.layers import layer_step_
from grpo.logprobs import CompletionScorer, group_attention
from grpo.lora import adapters_off, add_adapters_
from grpo.policy import Policy, Prompt
from grpo.pretrained import make_policy
from grpo.recipes import toy_config
from grpo.rollout import Rollouts, read_prompts, sample_rollouts
from grpo.update import micro_batches, prepare_training_, update_policy
from reward.attention import shared_heads
from reward.caprl import Verifier, caption_rewards

HALF = torch.bfloat16


@dataclass(frozen=True)
class GpuConfig:
    """Sizes of the measurement."""

    stages: tuple[str, ...] = ()
    """Names of stages, all if there is none."""
    budget_s: float = 840.0
    """Seconds after which no stage begins, and none goes on."""
    prompts: int = 16
    group_size: int = 8
    tokens: int = 512
    """Most tokens of a caption."""
    side: int = 896
    """Of the largest images, in pixels: 1,024 tokens. Others are narrower, by up to a quarter."""
    hidden: int = 2048
    intermediate: int = 11008
    layers: int = 36
    trained_layers: int = 12
    """Layers in stage "training": float32 weights, gradients and moments of 36 take 60 GB."""
    heads: int = 16
    key_heads: int = 2
    vocab: int = 151936
    vision_hidden: int = 1280
    vision_layers: int = 32
    micro_batch_tokens: int = 16_384
    ceiling_side: int = 8192
    """Side of the square matrices whose product is the measure of arithmetic."""
    repeats: int = 3
    smoke: bool = False


SMOKE = dict(prompts=3, group_size=2, tokens=8, side=112, hidden=64, intermediate=96, layers=2,
             trained_layers=1, heads=4, vocab=1024, vision_hidden=32, vision_layers=2,
             ceiling_side=128, repeats=1)


# --------------------------------------------------------------------- what the stages share


def build_models(config: GpuConfig, device: torch.device) -> tuple[Policy, Policy, Verifier]:
    """Policy, its reference and verifier with random weights, in bfloat16: 21 GB."""
    from transformers import (  # here: stages without models start sooner
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        Qwen2Config,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from data.toy.captioner import qwen_config

    tokenizer = build_tokenizer()
    text = dict(
        vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.intermediate,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads, max_position_embeddings=32768,
    )
    of_policy = qwen_config(tokenizer, text, vision=dict(
        depth=config.vision_layers, hidden_size=config.vision_hidden,
        intermediate_size=config.vision_hidden * 171 // 64,
        num_heads=max(1, config.vision_hidden // 80), fullatt_block_indexes=[7, 15, 23, 31],
    ))
    of_verifier = Qwen2Config(
        **text, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        policy, reference = (
            make_policy(AutoModelForImageTextToText.from_config(of_policy, dtype=HALF).eval(),
                        tokenizer, Qwen2VLImageProcessorPil())
            for _ in range(2)
        )
        answering = AutoModelForCausalLM.from_config(of_verifier, dtype=HALF).eval()
    reference.model.requires_grad_(False)
    verifier = Verifier(answering.requires_grad_(False), tokenizer, mode="sample")
    # No caption ends early: each measurement has the same tokens. Ids without a token, of which a
    # real checkpoint has a few hundred and this one 151,185, may be written.
    named = {i for i in policy.forbidden_ids if i < len(policy.tokenizer)}
    never = tuple(sorted({*named, *policy.eos_ids}))
    verifier.forbidden_ids = never
    return replace(policy, forbidden_ids=never), reference, verifier


def make_examples(config: GpuConfig) -> list[Example]:
    """Images of unlike sizes, and the same four questions on each."""
    names = ("circle", "square", "star", "bar")
    questions = tuple(Question(f"What color is the {name}?", ("red", "blue"), 0) for name in names)
    sides = [config.side - 28 * (i % (1 + config.side // 112)) for i in range(config.prompts)]
    images = [Image.effect_noise((side, config.side), 90).convert("RGB") for side in sides]
    return [Example(str(place), image, questions) for place, image in enumerate(images)]


def make_prompts(config: GpuConfig, policy: Policy) -> tuple[list[Prompt], list[str]]:
    """Prompts, and a key for each of their captions."""
    prompts = [policy.prompt(example.image).on(policy.model) for example in make_examples(config)]
    return prompts, [str(place) for place in range(config.prompts * config.group_size)]


def make_scorer(policy: Policy) -> CompletionScorer:
    return CompletionScorer(policy.model, policy.forbidden_ids)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object], repeats: int, warm_ups: int = 1) -> float:
    """The best of `repeats`, after some that are not counted."""
    times = []
    for _ in range(warm_ups + repeats):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - started)
    return min(times[warm_ups:])


def say(what: str, **numbers: object) -> None:
    """A line of numbers, at once."""
    shown = (f"{name} {f'{value:.4g}' if isinstance(value, float) else value}"
             for name, value in numbers.items())
    print(f"{what}: {', '.join(shown)}", flush=True)


def peak_gib() -> float:
    """Since the last call. 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def error_of(values: Tensor, wanted: Tensor) -> float:
    """Relative, by the norm."""
    return ((values.float() - wanted.float()).norm() / wanted.float().norm()).item()


def measure_limits(config: GpuConfig, device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy, both ways counted; floating-point operations per second of a
    bfloat16 product."""
    side = config.ceiling_side
    a, b = torch.randn(2, side, side, device=device, dtype=HALF)
    bandwidth = 2 * a.nbytes / seconds(lambda: b.copy_(a), 10 * config.repeats)
    arithmetic = 2 * side**3 / seconds(lambda: a @ b, config.repeats)
    say("limits", copied_gb_s=bandwidth / 1e9, product_tflop_s=arithmetic / 1e12)
    return bandwidth, arithmetic


def decoding_bytes(policy: Policy, rollouts: Rollouts) -> float:
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


def training_work(policy: Policy, rollouts: Rollouts) -> float:
    """Floating-point operations of forward and backward: 6 for each weight and token, 12 for each
    pair and width of attention in the language model; attention of the vision tower, mostly in
    windows, is left out. Checkpointing computes a forward pass twice, which is not counted."""
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


# -------------------------------------------------------------------------------- the stages


def environment(config: GpuConfig, device: torch.device) -> None:
    """Versions, the card, its free memory, and its limits."""
    import transformers

    say("versions", torch=torch.__version__, cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(), transformers=transformers.__version__)
    if device.type == "cuda":
        free, whole = (size / 2**30 for size in torch.cuda.mem_get_info())
        say("card", name=torch.cuda.get_device_name(), free_gib=free, gib=whole)
    measure_limits(config, device)


def run_training(settings: TrainConfig) -> None:
    """train.py with these settings, then the metrics and the seconds of its steps."""
    from train import train

    run_dir = Path(settings.run_dir)
    before = len(read_log(run_dir / "timing.jsonl"))
    train(settings)
    for timing in read_log(run_dir / "timing.jsonl")[before:]:
        say("timing", **timing)
    last = read_log(run_dir / "metrics.jsonl")[-1]
    chosen = {key: last[key] for key in ("reward", "sampler_gap", "grad_norm", "length")}
    say("metrics", **chosen, peak_gib=peak_gib())


def toy(config: GpuConfig, device: torch.device) -> None:
    """The whole of train.py: nccl, FSDP2, bfloat16, graphs, records; resumed from a checkpoint."""
    small = dict(data="toy:train:4", prompts_per_step=2, group_size=2, max_new_tokens=8,
                 probe_images=2)
    with TemporaryDirectory() as folder:
        for num_steps in (2, 4):
            run_training(toy_config(
                run_dir=f"{folder}/run", num_steps=num_steps, resume=num_steps > 2,
                gradient_checkpointing=True, verifier_mode="sample", verifier_max_new_tokens=4,
                audit_every=2, **(small if config.smoke else {}),
            ))


def patches(config: GpuConfig, device: torch.device) -> None:
    """Patch embedding: cuDNN's Conv3d, which transformers has, against the product that we use."""
    shape, of_image = (3, 2, 14, 14), (config.side // 14) ** 2
    weight = torch.randn(config.vision_hidden, *shape, device=device, dtype=HALF,
                         requires_grad=True)
    for number in (of_image, config.prompts * of_image):
        pixels = torch.randn(number, *shape, device=device, dtype=HALF)
        ways = {"product": lambda x=pixels: F.linear(x.flatten(1), weight.flatten(1)),
                "conv3d": lambda x=pixels: F.conv3d(x, weight, stride=shape[1:])}
        for name, way in ways.items():
            first = seconds(way, 1, warm_ups=0)
            say(f"{name} of {number} patches", first_ms=1e3 * first,
                forward_ms=1e3 * seconds(way, config.repeats),
                both_ms=1e3 * seconds(lambda f=way: f().sum().backward(), config.repeats))


def attention(config: GpuConfig, device: torch.device) -> None:
    """What a new shape costs with cuDNN and without. The kernels that we rely on against float32:
    prompts and captions of packed groups, windows of the vision tower, heads of the verifier."""
    width, rows = config.hidden // config.heads, config.prompts * config.group_size
    prompt = (config.side // 28) ** 2

    def states(batch: int, length: int, keys: int, heads: int = 0, size: int = 0) -> list[Tensor]:
        numbers = [(length, heads or config.heads), *[(keys, heads or config.key_heads)] * 2]
        shapes = [(batch, tokens, number, size or width) for tokens, number in numbers]
        return [torch.randn(shape, device=device, dtype=HALF).transpose(1, 2).requires_grad_()
                for shape in shapes]

    for uses_cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
        for length in (prompt + 11 + uses_cudnn, prompt + 53 + uses_cudnn):
            query, key, value = states(1, length, length)
            call = lambda q=query, k=key, v=value: F.scaled_dot_product_attention(  # noqa: E731
                q, k, v, is_causal=True, enable_gqa=True).sum().backward()
            first = seconds(call, 1, warm_ups=0)
            say(f"prompt of {length} tokens, cuDNN {uses_cudnn}", first_ms=1e3 * first,
                both_ms=1e3 * seconds(call, config.repeats))

    def compare(name: str, call: Callable[[], Tensor], inputs: list[Tensor],
                sees: Tensor | None) -> None:
        """Output and gradients against attention in float32 that is written out."""
        out = call()
        wide = [part.detach().float().requires_grad_() for part in inputs]
        key, value = (part.repeat_interleave(len(inputs[0][0]) // len(part[0]), 1)
                      for part in wide[1:])
        scores = wide[0] @ key.transpose(2, 3) * inputs[0].shape[-1] ** -0.5
        scores = scores if sees is None else scores.masked_fill(~sees, -torch.inf)
        wanted = scores.softmax(-1) @ value
        grad = torch.randn_like(out)
        errors = [error_of(out.detach(), wanted.detach())]
        for part, other in zip(torch.autograd.grad(out, inputs, grad),
                               torch.autograd.grad(wanted, wide, grad.float())):
            errors.append(error_of(part, other))
        say(name, errors=" ".join(f"{error:.1g}" for error in errors),
            forward_ms=1e3 * seconds(call, config.repeats))

    segment = [prompt, *[config.tokens] * config.group_size]
    inputs = states(1, sum(segment), sum(segment))
    part = torch.repeat_interleave(torch.tensor(segment)).to(device)
    sees = ((part[:, None] == part) | (part == 0)).tril()
    scaling = width**-0.5
    compare("a packed group", lambda: group_attention(
        torch.nn.Identity(), *inputs, None, scaling, [segment])[0].transpose(1, 2), inputs, sees)

    from grpo.vision import window_attention

    windows, size = (config.side // 112) ** 2, 64
    heads = max(1, config.vision_hidden // 80)
    inputs = states(1, windows * size, windows * size, heads, config.vision_hidden // heads)
    bounds = torch.arange(0, windows * size + 1, size, dtype=torch.int32)
    places = torch.arange(windows * size, device=device) // size
    scaling = inputs[0].shape[-1] ** -0.5
    compare(f"{windows} windows of the tower", lambda: window_attention(
        torch.nn.Identity(), *inputs, None, scaling, bounds)[0].transpose(1, 2),
        inputs, places[:, None] == places)

    for length in (1, 64):  # the verifier's reply, and its questions
        inputs = states(rows, length, prompt)
        seen = torch.rand(rows, 1, length, prompt, device=device) > 0.1
        compare(f"{length} tokens of the verifier, {rows} rows", lambda i=inputs, s=seen:
                shared_heads(torch.nn.Identity(), *i, s)[0].transpose(1, 2), inputs, seen)


def products(config: GpuConfig, device: torch.device) -> None:
    """Products of a decoding layer by their alignment, and the head's with a float32 result."""
    # Results in float32 of bfloat16 factors exist for CUDA only.
    wide = dict(out_dtype=torch.float32) if device.type == "cuda" else {}
    width, shared = config.hidden // config.heads, config.heads // config.key_heads
    groups, rows = config.prompts * config.key_heads, config.group_size * shared

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=HALF)

    bandwidth, _ = measure_limits(config, device)
    aligned = (config.side // 28) ** 2 + 32
    query = draw(groups, rows, width)
    for length in (aligned - 3, aligned):
        key, probs = draw(groups, length, width), draw(groups, rows, length)
        say(f"{length} tokens of prompts", scores_us=1e6 * seconds(
            lambda k=key: torch.bmm(query, k.transpose(1, 2), **wide), 10 * config.repeats),
            values_us=1e6 * seconds(lambda k=key, p=probs: p @ k, 10 * config.repeats),
            reading_allows_us=1e6 * key.nbytes / bandwidth)
    hidden, head = (draw(size, config.hidden) for size in
                    (config.prompts * config.group_size, config.vocab))
    out = torch.empty(len(hidden), config.vocab, device=device)
    say("head", rows=len(hidden),
        cast_ms=1e3 * seconds(lambda: out.copy_(hidden @ head.T), config.repeats),
        float32_ms=1e3 * seconds(lambda: torch.mm(hidden, head.T, **wide), config.repeats))


@torch.no_grad()
def decoding(config: GpuConfig, device: torch.device) -> None:
    """The recorded step against the plain one: seconds, logits, memory. Then how far sampler and
    trainer are apart."""
    policy, _, _ = build_models(config, device)
    prompts, keys = make_prompts(config, policy)
    prefill = lambda: read_prompts(policy, prompts)  # noqa: E731
    say("prompts", first_s=seconds(prefill, 1, warm_ups=0),
        again_s=seconds(prefill, config.repeats, warm_ups=0), peak_gib=peak_gib())
    rows = torch.arange(len(keys), device=device)
    starts = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    starts, kept = starts.repeat_interleave(config.group_size), []
    # Each has one part less: kernels of grpo/attend.py, the compiler, the recording.
    for way in ("kernels", "compiled", "recorded", "plain"):
        decoder = Decoder(policy.model, config.group_size, config.tokens)
        decoder.uses_graphs &= way != "plain"
        decoder.uses_kernels &= way == "kernels"
        if way not in ("kernels", "compiled"):
            decoder.layer_step_ = layer_step_
        _, cache, mask = read_prompts(policy, prompts)
        decoder.add(cache, mask)
        step = lambda d=decoder: d.step(rows % 500, starts + d.longest, rows)  # noqa: E731
        first = seconds(step, 1, warm_ups=0)
        kept.append([step().clone() for _ in range(2)][-1])
        say(f"a token of all rows, {way}", recorded=decoder.recording is not None,
            first_ms=1e3 * first, again_ms=1e3 * seconds(step, config.tokens // 4),
            peak_gib=peak_gib())
    say("errors of logits against plain", kernels=error_of(kept[0], kept[-1]),
        compiled=error_of(kept[1], kept[-1]), recorded=error_of(kept[2], kept[-1]))
    rollouts = sample_rollouts(policy, prompts[:2], keys[: 2 * config.group_size], config.tokens)
    logprobs, _ = make_scorer(policy)(rollouts)
    gaps = (logprobs - rollouts.logprobs)[rollouts.completion_mask]
    say("sampler against trainer", gap_nats=gaps.abs().mean().item(), aim="below 0.02",
        mean_ratio=gaps.exp().mean().item(), worst=gaps.abs().max().item())


def phases(config: GpuConfig, device: torch.device,
           lora_rank: int = 0) -> Iterator[tuple[str, Callable, object]]:
    """Each phase of a step as a function, and what limits it: policy and rollouts."""
    policy, reference, verifier = build_models(config, device)
    settings = toy_config(group_size=config.group_size, max_new_tokens=config.tokens,
                          prompts_per_step=config.prompts, gradient_checkpointing=True,
                          micro_batch_tokens=config.micro_batch_tokens, kl_coef=0.04,
                          lora_rank=lora_rank)
    if lora_rank:
        reference = policy  # one model is both
        add_adapters_(policy.model, settings.lora, "none", seed=0)
    prepare_training_(policy.model, settings)
    scorer, frozen = make_scorer(policy), make_scorer(reference)
    if lora_rank:
        frozen = adapters_off(policy.model)(frozen)
        trained = [part for part in scorer.parameters() if part.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=device.type == "cuda")
    else:
        optimizer = torch.optim.SGD(scorer.parameters(), lr=1e-6)  # without state
    prompts, keys = make_prompts(config, policy)
    rollouts = sample_rollouts(policy, prompts, keys, config.tokens)
    # The verifier's captions have unlike lengths, as real ones have.
    captions = ["The bar is red." + " red" * (config.tokens * (2 + i % 7) // 8)
                for i in range(len(keys))]
    by_caption = [example for example in make_examples(config) for _ in range(config.group_size)]
    advantages = torch.randn(len(keys), device=device)
    valid = torch.ones(len(keys), dtype=torch.bool, device=device)
    names, asking = [example.id for example in by_caption], RewardConfig(num_questions=4)

    @torch.no_grad()
    def refer() -> None:
        for start, stop in micro_batches(rollouts, settings.micro_batch_tokens):
            frozen(rollouts.groups(start, stop), with_entropy=False)

    functions = {
        "first token": lambda: sample_rollouts(policy, prompts, keys, 1),
        "rollout": lambda: sample_rollouts(policy, prompts, keys, config.tokens),
        "verifier": lambda: caption_rewards(captions, by_caption, names, [0] * len(keys), verifier,
                                            asking),
        "reference pass": refer,
        "forward + backward": lambda: update_policy(scorer, None, optimizer, rollouts, advantages,
                                                    valid, settings),
    }
    for name, function in functions.items():
        yield name, function, (policy, rollouts)


def step(config: GpuConfig, device: torch.device) -> None:
    """A step by phase, without masters and moments: seconds, memory, and what the card allows."""
    bandwidth, arithmetic = measure_limits(config, device)
    spent = {}
    for name, function, (policy, rollouts) in phases(config, device):
        peak_gib()
        spent[name] = seconds(function, config.repeats)
        say(name, seconds=spent[name], peak_gib=peak_gib())
        if name == "rollout":
            each = max(spent["rollout"] - spent["first token"], 1e-9) / (config.tokens - 1)
            rate, allowed = (len(rollouts.tokens) / value for value in
                             (each, decoding_bytes(policy, rollouts) / bandwidth))
            print(f"decoding: {rate:.0f} tokens/s, {rate / allowed:.0%} of the {allowed:.0f} that "
                  "bandwidth allows (aim 60%)", flush=True)
    rate = training_work(policy, rollouts) / spent["forward + backward"]
    print(f"forward + backward: {rate / 1e12:.2f} TFLOP/s, {rate / arithmetic:.0%} of the "
          "product's (aim 45%)", flush=True)
    say("whole step", seconds=sum(spent.values()) - spent["first token"])


def adapters(config: GpuConfig, device: torch.device) -> None:
    """A step with adapters of rank 64 by phase: seconds, and memory, which is to fit 24 GB."""
    few = replace(config, prompts=min(2, config.prompts), tokens=2 * config.tokens,
                  micro_batch_tokens=4096)
    for name, function, _ in phases(few, device, lora_rank=64):
        peak_gib()
        spent = seconds(function, 1)
        say(name, seconds=spent, peak_gib=peak_gib(), aim="below 22 GiB")


def write_run(config: GpuConfig, device: torch.device, folder: Path) -> TrainConfig:
    """Writes models and images into the folder. Returns settings of a run on them."""
    policy, _, verifier = build_models(config, device)
    # One in tokens / 2 of the ids that can be drawn ends a caption.
    ends = range(0, len(policy.tokenizer), max(2, config.tokens // 2))
    policy.model.generation_config.eos_token_id = list(ends)
    policy.image_processor.save_pretrained(folder / "policy")
    for part, model in (("policy", policy.model), ("verifier", verifier.model)):
        model.save_pretrained(folder / part)
        policy.tokenizer.save_pretrained(folder / part)
    write_examples(folder, make_examples(config))
    return toy_config(
        policy=f"{folder}/policy", verifier=f"{folder}/verifier", data=f"{folder}/examples.jsonl",
        run_dir=f"{folder}/run", num_steps=config.repeats, prompts_per_step=config.prompts,
        group_size=config.group_size, max_new_tokens=config.tokens, kl_coef=0.04,
        micro_batch_tokens=config.micro_batch_tokens, gradient_checkpointing=True,
        verifier_mode="sample", audit_every=100, probe_images=2,
    )


def memory_folder() -> TemporaryDirectory:
    """In the host's memory where that has a folder: a checkpoint of 20 GB takes a disk too long."""
    return TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def check(config: GpuConfig, device: torch.device) -> None:
    """What train.py --check says of a run with all layers: does it fit, and how long is a step."""
    from tools.check import check as check_run

    with memory_folder() as name:
        try:
            check_run(replace(write_run(config, device, Path(name)), check=True))
        except SystemExit as end:
            say("check", exit_code=end.code)


def training(config: GpuConfig, device: torch.device) -> None:
    """Steps of train.py with FSDP2, AdamW and all records, where captions have unlike lengths."""
    with memory_folder() as name:
        sizes = replace(config, layers=config.trained_layers)
        settings = write_run(sizes, device, Path(name))
        peak_gib()  # the models that were written are gone
        run_training(settings)


def profile(config: GpuConfig, device: torch.device) -> None:
    """The share of each phase in which the GPU works, and its largest kernels."""
    from torch.profiler import ProfilerActivity, supported_activities
    from torch.profiler import profile as recorded

    few = replace(config, prompts=min(4, config.prompts), tokens=config.tokens // 4)
    kind, key = ProfilerActivity.CPU, "self_cpu_time_total"
    if ProfilerActivity.CUDA in supported_activities():
        kind, key = ProfilerActivity.CUDA, "self_device_time_total"
    for name, function, _ in phases(few, device):
        wall = seconds(function, 1)
        with recorded(activities=[kind]) as seen:
            seconds(function, 1, warm_ups=0)
        events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
        busy = sum(getattr(event, key) for event in events) / 1e6
        say(name, seconds=wall, kernels_s=busy, aim="95% of the seconds")
        for event in events[:8]:
            say(f"    {event.key[:80]}", calls=event.count, ms=getattr(event, key) / 1e3)


STAGES = {environment: 40, toy: 150, patches: 40, attention: 60, products: 40, decoding: 90,
          step: 160, adapters: 60, training: 150, check: 150, profile: 50}
"""In this order; each with the most seconds that it may take."""


def main(config: GpuConfig) -> None:
    if config.smoke:
        config = replace(config, **SMOKE)
    limits = {function.__name__: limit for function, limit in STAGES.items()}
    names = config.stages or tuple(limits)
    if unknown := set(names) - set(limits):
        raise SystemExit(f"error: expected stages of {list(limits)}, found {sorted(unknown)}")
    if not torch.cuda.is_available() and not config.smoke:
        raise SystemExit("error: expected a GPU, found none; --smoke runs tiny shapes anywhere")
    started, failed = time.monotonic(), []
    for function, limit in STAGES.items():
        name, begun = function.__name__, time.monotonic()
        limit = min(limit, config.budget_s - (begun - started))
        if name not in names:
            continue
        print(f"\n## {name}: at most {limit:.0f} s", flush=True)
        try:
            if limit <= 0:
                raise TimeoutError(f"the budget of {config.budget_s:.0f} s is spent")
            if config.smoke or len(names) == 1:
                function(config, local_device())
            else:
                command = [sys.executable, "-u", __file__, *sys.argv[1:], "--stages", name]
                subprocess.run(command, check=True, timeout=limit)
        except (Exception, SystemExit) as error:
            failed.append(name)
            if config.smoke or len(names) == 1:
                traceback.print_exc(limit=-6)
            print(f"## {name} FAILED: {type(error).__name__}: {error}"[:400], flush=True)
        print(f"## {name}: {time.monotonic() - begun:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(GpuConfig))
