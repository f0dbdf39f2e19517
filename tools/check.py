"""`train.py --check` looks in minutes for what would go wrong hours into a run. It uses the real
models, data and machine. No weight changes."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from data.choices import LETTERS
from data.examples import Example
from data.images import image_size, open_image
from data.io import check_room, nearest
from data.pictures import merge_pictures
from data.program import tell_torchrun
from data.rows import read_manifest, scan_examples
from grpo.config import TrainConfig
from grpo.distributed import all_or_none, gather_rows, init_distributed, print0, rank, world_size
from grpo.logprobs import CompletionScorer
from grpo.policy import Policy, Prompt, encode_images
from grpo.rollout import Rollouts
from grpo.run import Run, load_run, sample_step
from grpo.update import update_policy
from reward.caprl import Verifier, shuffle_options
from reward.step import Reward, check_examples, load_reward, reward_step
from tools.audit import gold_probe
from tools.held_out import HeldOut, set_aside
from tools.memory import (
    available_memory,
    held,
    limited,
    measure,
    num_parameters,
    rollout_bytes,
    step_images,
    weights_held,
)
from tools.tracker import Tracker

TRIAL_TOKENS = 256
"""Tokens per caption of the trial rollout."""
SPARE = 0.92
"""Share of the memory that a peak may fill: allocators leave gaps, and estimates may be a tenth too
low."""
LESS_MEMORY = ("--gradient-checkpointing, a smaller --micro-batch-tokens, --rollout-tokens or "
               "--max-new-tokens, --offload-reference, more ranks, adapters (--lora-rank 64)")


@dataclass(frozen=True)
class Finding:
    what: str
    facts: str
    problem: str = ""
    """What is wrong and what to do about it; empty where all is well."""


def format_findings(findings: Sequence[Finding]) -> str:
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        mark = "WRONG" if finding.problem else "ok"
        lines.append(f"{mark:5}  {finding.what:{width}}  {finding.facts}")
        if finding.problem:
            lines.append(f"{'':5}  {'':{width}}  {finding.problem}")
    return "\n".join(lines)


def check_sampling(sampler: Policy, config: TrainConfig) -> Finding:
    special = (sampler.eos_ids, [sampler.pad_id], sampler.forbidden_ids)
    eos, pad, never = (token_names(sampler, ids) for ids in special)
    is_clear = set(sampler.eos_ids).isdisjoint(sampler.forbidden_ids)
    return Finding(
        "sampling",
        f"temperature {config.temperature}, no top-k or top-p, no penalties, at most "
        f"{config.max_new_tokens} tokens; EOS {eos}, pad {pad}, never {never}; the checkpoint's "
        "generation_config is not used",
        "" if is_clear else "an EOS id is an image marker too: look at the policy's config.json",
    )


def token_names(policy: Policy, ids: Sequence[int]) -> str:
    """Ids with their tokens, for messages; ids without a token are counted."""
    tokens = policy.tokenizer.convert_ids_to_tokens(list(ids))
    named = [f"{i} {token}" for i, token in zip(ids, tokens) if token is not None]
    unnamed = [f"{tokens.count(None)} ids without a token"] if None in tokens else []
    return ", ".join(named + unnamed)


def check_templates(texts: dict[str, str]) -> Finding:
    """texts: by model, the end of a prompt as its chat template writes it."""
    thinking = [
        name for name, text in texts.items() if text.rfind("<think>") > text.rfind("</think>")
    ]
    return Finding(
        "templates", f"of {' and '.join(texts)}",
        f"{' and '.join(thinking)}: it opens <think>, to think where it is to answer; take a model "
        "that does not think, or close it in the chat template with </think>" if thinking else "",
    )


def pixel_setting(sampler: Policy) -> str:
    """The setting, and the file of the checkpoint, that bounds an image's pixels. A processor of
    processor_config.json counts before a file of its own, max_pixels before longest_edge."""
    name = "processor_config.json"
    settings = json.loads(sampler.files.get(name, b"{}")).get("image_processor")
    if settings is None:
        name = "preprocessor_config.json"
        settings = json.loads(sampler.files.get(name, b"{}"))
    return f"{'longest_edge' if settings.get('max_pixels') is None else 'max_pixels'} in {name}"


def check_lengths(sampler: Policy, image_tokens: Sequence[int], text_tokens: int,
                  verifier_room: int | None, config: TrainConfig) -> Finding:
    """verifier_room: tokens that the verifier has for a caption."""
    room = sampler.model.config.get_text_config().max_position_embeddings
    ordered = sorted(image_tokens)
    longest = ordered[-1] + text_tokens + config.max_new_tokens
    limit = sampler.image_processor.size["longest_edge"]
    pixels = sampler.image_processor.patch_size * sampler.image_processor.merge_size
    problem = ""
    if longest > room:
        problem = (f"the longest prompt and its caption take {longest} positions, the policy has "
                   f"{room}: lower --max-new-tokens, or {pixel_setting(sampler)}")
    elif verifier_room is not None and config.max_new_tokens > verifier_room:
        problem = (f"the verifier has room for captions of {verifier_room} tokens: longer ones "
                   "could not be scored; lower --max-new-tokens or take a verifier with a longer "
                   "context")
    return Finding(
        "tokens",
        f"images {ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}, at most "
        f"{limit // pixels**2} at this processor's {limit} pixels; text {text_tokens}",
        problem,
    )


def longest_prompt(verifier: Verifier, examples: Sequence[Example]) -> int:
    """Tokens of the longest prompt beside the caption: head, question and options."""
    writer, longest = verifier.writers[True], 0
    for question in (question for example in examples for question in example.questions):
        asked = shuffle_options(question, 0, None, abstain=len(question.choices) < len(LETTERS))
        longest = max(longest, len(writer.question_ids(asked)))
    return len(writer.head_ids) + len(writer.caption_ids("")) + longest


def longest_micro_batches(prompt: Prompt, run: Run, config: TrainConfig) -> Rollouts:
    """Captions of `max_new_tokens` tokens for two micro-batches of this rank, or for one where it
    has only one. Two, because the second one meets the gradients of the first."""
    group_tokens = len(prompt.input_ids) + config.group_size * config.max_new_tokens
    in_two = 2 * max(1, config.micro_batch_tokens // group_tokens)
    prompts = [prompt] * min(in_two, config.prompts_per_rank(world_size()))
    size = (len(prompts) * config.group_size, config.max_new_tokens)  # (B, L)
    tokens = torch.full(size, run.sampler.eos_ids[0], device=run.device)  # any that is scored
    return Rollouts(
        prompts, tokens, torch.full((len(tokens),), config.max_new_tokens),
        torch.zeros_like(tokens, dtype=torch.float32), torch.ones_like(tokens[:, 0]).bool(),
        [""] * len(tokens),
    )


def try_update(run: Run, rollouts: Rollouts, config: TrainConfig) -> None:
    """The update of these captions, without the optimizer's step."""
    still = SimpleNamespace(step=lambda: None, zero_grad=run.optimizer.zero_grad)
    num_rows = len(rollouts.tokens)
    update_policy(run.scorer, run.reference, still, rollouts,
                  torch.zeros(num_rows, device=run.device),
                  torch.ones(num_rows, dtype=torch.bool, device=run.device), config)


def try_rollout(run: Run, prompts: Sequence[Prompt], examples: Sequence[Example],
                config: TrainConfig) -> Rollouts:
    """The G captions of each example, of at most TRIAL_TOKENS tokens."""
    short = replace(config, max_new_tokens=min(config.max_new_tokens, TRIAL_TOKENS))
    return sample_step(run, examples, prompts, "check", short)


def try_step(run: Run, reward: Reward, examples: Sequence[Example],
             config: TrainConfig) -> tuple[dict[str, float], Rollouts]:
    """Seconds by phase of a step on these examples, with captions of at most TRIAL_TOKENS tokens,
    and these captions. No weight changes. Every rank must call this."""
    device, drawn = run.device, []
    prompts = [run.sampler.prompt(open_image(example.image)) for example in examples]
    rollout_s, _ = measure(lambda: drawn.append(try_rollout(run, prompts, examples, config)),
                           device)
    (rollouts,) = drawn
    reward_s, _ = measure(lambda: reward_step(reward, examples, rollouts, "check", config), device)
    update_s, _ = measure(lambda: try_update(run, rollouts, config), device)
    return {"rollout": rollout_s, "reward": reward_s, "update": update_s}, rollouts


def check_longest_step(run: Run, reward: Reward, examples: Sequence[Example], prompt: Prompt,
                       image_tokens: int, config: TrainConfig) -> list[Finding]:
    """Time and memory of the longest step, as far as it can be tried. Every rank must call this.

    prompt: the longest. Raises ValueError, on this rank alone, where several ranks run and this one
    cannot hold the step: the others wait in a collective, so that no table can be printed.
    """
    device, share = run.device, config.prompts_per_rank(world_size())
    available, before = available_memory(device), held(device)
    models = reward.image_models | ({"verifier": reward.verifier} if reward.verifier else {})
    parts = weights_held(run, {f"{name}'s weights": own.model for name, own in models.items()})
    if run.is_tower_frozen:
        (prompt,) = encode_images(run.sampler, [prompt])
    rollouts, mine = longest_micro_batches(prompt, run, config), examples[:share]
    num_rows, length = share * config.group_size, config.max_new_tokens
    written = SimpleNamespace(captions=[" red" * length] * num_rows,
                              lengths=torch.full((num_rows,), length))
    try:
        with limited(available if device.type == "cpu" else None):
            if device.type == "cuda":  # the first pass compiles, for many seconds
                try_step(run, reward, mine, config)
            reward_s, reward_peak = measure(
                lambda: reward_step(reward, mine, written, "check", config), device)
            update_s, update_peak = measure(lambda: try_update(run, rollouts, config), device)
            trial, drawn = try_step(run, reward, mine, config)
    except MemoryError as error:
        reason = (str(error).splitlines() or ["MemoryError"])[0][:200]  # Python's own is empty
        facts = f"the longest step does not fit into {_gib(available)} ({reason})"
        if world_size() > 1:
            raise ValueError(f"rank {rank()}: {facts}: {LESS_MEMORY}") from None
        return [Finding("memory", facts, f"too much: {LESS_MEMORY}")]
    sampling = rollout_bytes(run.sampler.model, config, world_size(),
                             run.sampler.model.dtype.itemsize, len(prompt.input_ids), image_tokens)
    images = step_images(run.sampler.model, config, world_size(), run.sampler.model.dtype.itemsize,
                         image_tokens, device.type == "cuda", prompt.features is not None)
    parts |= {"images": images, "phase rollout": sampling,
              "phase verifier": max(0, reward_peak - before),
              "phase update": max(0, update_peak - before),
              "peak": images + max(before + sampling, reward_peak, update_peak)}
    group_tokens = len(prompt.input_ids) + config.group_size * length
    rounds = math.ceil(share / max(1, config.rollout_tokens // group_tokens))
    longest = {"rollout": trial["rollout"] * rounds * length / drawn.tokens.shape[1],
               "reward": reward_s, "update": update_s * share / len(rollouts.prompts)}
    return [check_memory(parts, available), check_time(trial, longest, drawn, config)]


def check_time(trial: dict[str, float], longest: dict[str, float], drawn: Rollouts,
               config: TrainConfig) -> Finding:
    """Seconds of a step and hours of the run on the slowest rank, from captions as in the trial to
    the longest. Every rank must call this.

    trial, longest: seconds by phase. The longest rollout is the trial's times its tokens: each
    takes as long. drawn: the captions of the trial.
    """
    slowest = (max(gather_rows([sum(phases.values())])) for phases in (trial, longest))
    low, high = sorted(slowest)
    hours = [seconds * config.num_steps / 3600 for seconds in (low, high)]
    phases = ", ".join(f"{name} {seconds:.1f} to {max(seconds, longest[name]):.1f}"
                       for name, seconds in trial.items())
    mean = drawn.lengths.float().mean()
    cut = f", {drawn.truncated.float().mean():.0%} of them cut off" if drawn.truncated.any() else ""
    return Finding(
        "time", f"{low:.1f} to {high:.1f} s a step ({phases}), {config.num_steps} steps in "
        f"{hours[0]:.2f} to {hours[1]:.2f} hours: with captions of {mean:.0f} tokens as "
        f"in the trial{cut}, and with {config.max_new_tokens} as allowed; audits, evaluations and "
        "checkpoints come on top")


def check_memory(parts: dict[str, int], available: int) -> Finding:
    """parts: bytes, with the "peak" of any rank."""
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if name != "peak")
    peak = max(gather_rows([parts["peak"]]))
    available = min(gather_rows([available]))
    return Finding("memory", f"peak {_gib(peak)} of {_gib(available)} per rank: {named}",
                   f"too much: {LESS_MEMORY}" if peak > SPARE * available else "")


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


@torch.no_grad()
def check_policy(rollouts: Rollouts, scorer: CompletionScorer,
                 forbidden_ids: Sequence[int]) -> Finding:
    """Sampler and trainer on a trial rollout. Every rank must call this."""
    logprobs, entropies = scorer(rollouts)
    for module in scorer.modules():  # after a forward alone the root is still gathered
        if isinstance(module, FSDPModule):
            module.reshard()
    mask = rollouts.completion_mask
    difference = (logprobs - rollouts.logprobs)[mask]
    ratio, gap = difference.exp().mean().item(), difference.abs().mean().item()
    problem = ""
    if not (abs(ratio - 1) < 0.05 and gap < 0.1):
        problem = ("sampler and trainer are not one policy: look at precision, chat template and "
                   "transformers' version")
    elif torch.isin(rollouts.tokens[mask], torch.tensor(forbidden_ids, device=mask.device)).any():
        problem = "the policy wrote image markers"
    return Finding(
        "policy",
        f"{len(rollouts.captions)} captions of up to {rollouts.tokens.shape[1]} tokens, "
        f"{int((~rollouts.truncated).sum())} ended; on-policy ratio {ratio:.4f}, gap {gap:.1e} "
        f"nats, at most {difference.abs().max().item():.1e}, entropy "
        f"{entropies[mask].mean().item():.2f}; the first begins: {rollouts.captions[0][:60]!r}",
        problem,
    )


def check_verifier(scores: dict) -> Finding:
    """scores: of `tools.audit.gold_probe`."""
    problem = ""
    if scores["failed_share"]:
        problem = f"{scores['failed_share']:.0%} could not be scored, as: {scores['failure']}"
    elif not scores["gold_caption"] > max(0.7, scores["no_caption"] + 0.2):
        problem = ("it does not find an answer that it is told: take another verifier, or look at "
                   "its chat template")
    elif scores["no_caption"] > scores["chance"] + 0.15:
        problem = "questions are answered without a caption: keep those that need the image"
    return Finding(
        "verifier",
        f"told the answer {scores['gold_caption']:.2f}, without a caption "
        f"{scores['no_caption']:.2f}, chance {scores['chance']:.2f}; "
        f"{scores['unparsed_share']:.0%} of the replies unreadable; "
        f"{scores['questions_per_second']:.0f} questions a second on a rank", problem,
    )


def check_held_out(held_out: HeldOut, config: TrainConfig) -> Finding:
    """What an evaluation costs, in captions and questions of a step."""
    counts = [len(picture.items) for picture in held_out.benchmark.pictures]
    samples = max(1, config.held_out.eval_samples)
    captions, asked = samples * len(counts), samples * sum(counts)
    per_step = config.num_captions
    reward = config.reward_config
    questions = per_step * reward.num_questions * max(1, reward.num_shuffles)
    number = 2 + (config.num_steps - 1) // config.held_out.eval_every
    return Finding(
        "held out",
        f"{number} evaluations on {len(counts)} images; each has {captions} captions and {asked} "
        f"answers, as {captions / per_step:.1f} and {asked / questions:.1f} steps have",
    )


def check_disk(folder: Path, parameters: int, trained: int, config: TrainConfig) -> Finding:
    """A checkpoint has 12 bytes per trained parameter, an export 2 or 4 of all. While one is
    written, the old ones are there too."""
    there = nearest(folder)
    free = shutil.disk_usage(there).free
    exports = 1 + bool(config.held_out.eval_data)  # final, best
    exports += (config.num_steps - 1) // config.export_every if config.export_every else 0
    width = 2 if config.save_dtype == "bfloat16" else 4
    needed = 12 * trained * (config.keep_checkpoints + 1) + width * parameters * (exports + 1)
    return Finding("disk", f"{_gib(needed)} needed of {_gib(free)} free at {there}",
                   "" if needed < free else "too little: lower --keep-checkpoints, raise "
                   "--export-every, or take another --run-dir")


def check_data(config: TrainConfig) -> tuple[Finding, list[Example], dict[str, tuple[int, int]]]:
    """The examples whose images can be opened, and the images' sizes by id. Every rank must call
    this."""
    with all_or_none("data"):
        examples, refused = scan_examples(config.data)
    examples = merge_pictures(examples)
    unreadable, sizes = [], {}
    own = examples[rank() :: world_size()]
    for example in tqdm(own, desc="images", unit="image", disable=rank() != 0):
        try:
            sizes[example.id] = image_size(example.image)
        except ValueError as error:
            unreadable.append(str(error))
    unreadable, sizes = gather_rows(unreadable), dict(gather_rows(list(sizes.items())))
    counts = [len(example.questions) for example in examples]
    bad = [*refused, *unreadable]
    if refused and not examples:
        from data.advice import no_sound_row  # here: it is for wrong input

        bad = [no_sound_row(config.data, refused)]
    finding = Finding(
        "data", f"{len(examples)} images with {min(counts, default=0)} to {max(counts, default=0)} "
        f"questions, {len(read_manifest(config.data))} rows and questions left out as the manifest "
        "lists",
        f"{len(refused)} rows and {len(unreadable)} images cannot be used: {'; '.join(bad[:5])}"
        if bad else "",
    )
    return finding, [example for example in examples if example.id in sizes], sizes


def check(config: TrainConfig) -> None:
    """`--check`: prints what was seen of models, data and machine. SystemExit with code 2 if
    anything is wrong."""
    device = init_distributed(config.timeout_minutes)
    share = config.prompts_per_rank(world_size())
    check_room(Path(config.run_dir))
    parts = 1 if config.lora.lora_rank else world_size() // config.replicas
    ranks = (f"{world_size()} on {device.type}, {share} of {config.prompts_per_step} prompts each, "
             + (f"weights in {parts} parts" if parts > 1 else "all weights on each"))
    data, examples, sizes = check_data(config)
    findings = [Finding("ranks", ranks), data]
    if data.problem and len(examples) < config.prompts_per_step:  # too few for a step are left
        _end(findings)
    with all_or_none("start"):
        if config.tracker:
            Tracker(config.tracker)
        if config.held_out.eval_data:
            examples, held_out = set_aside(examples, config)
            findings.append(check_held_out(held_out, config))
        check_examples(examples, config)
        reward = load_reward(config, device)
    run = load_run(config, device)
    sampler, verifier = run.sampler, reward.verifier

    findings.append(check_sampling(sampler, config))
    of_image = {id: sampler.image_tokens(*size) for id, size in sizes.items()}
    largest = max(examples, key=lambda example: of_image[example.id])
    with all_or_none("images"):
        *prompts, longest = [sampler.prompt(open_image(example.image))
                             for example in (*examples[:2], largest)]
    text_tokens = len(prompts[0].input_ids) - of_image[examples[0].id]
    ends = {"policy": sampler.tokenizer.decode(prompts[0].input_ids)}
    if verifier:
        writer = verifier.writers[config.reward_config.abstain]
        ends["verifier"] = verifier.tokenizer.decode(writer.tail_ids)
    findings.append(check_templates(ends))
    room = verifier.context - longest_prompt(verifier, examples) if verifier else None
    findings.append(check_lengths(sampler, list(of_image.values()), text_tokens, room, config))

    rollouts = try_rollout(run, prompts, examples[:2], config)
    findings.append(check_policy(rollouts, run.scorer, sampler.forbidden_ids))
    if verifier:
        probes = examples[: config.probe_images]
        findings.append(check_verifier(gold_probe(probes, verifier, config.reward_config)))
    findings += check_longest_step(run, reward, examples, longest, of_image[largest.id], config)
    trained = sum(tensor.numel() for group in run.optimizer.param_groups
                  for tensor in group["params"])
    findings.append(check_disk(Path(config.run_dir), num_parameters(sampler.model), trained,
                               config))
    if any(gather_rows([any(finding.problem for finding in findings)])):  # on any rank
        _end(findings)
    print0(format_findings(findings))


def _end(findings: Sequence[Finding]) -> None:
    print0(format_findings(findings))
    tell_torchrun(format_findings([finding for finding in findings if finding.problem]))
    raise SystemExit(2)
