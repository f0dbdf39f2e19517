"""`train.py --check`: what would go wrong hours into a run, looked for in minutes, on the real models, data and machine."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.examples import merge_pictures
from data.images import image_size, open_image
from data.io import check_room
from data.rows import read_manifest, scan_examples
from grpo.config import TrainConfig
from grpo.distributed import all_or_none, gather_rows, init_distributed, print0, rank, world_size
from grpo.logprobs import CompletionScorer
from grpo.policy import Policy
from grpo.rollout import Rollouts, sample_rollouts
from grpo.run import load_run
from reward.step import check_examples, load_reward
from tools.audit import gold_probe
from tools.memory import estimate_memory

TRIAL_TOKENS = 256
"""Tokens per caption of the trial rollout."""
SPARE = 0.92
"""Share of the memory that an estimate may fill: allocators leave gaps, and the estimate of a peak may be a tenth too low."""


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    problem: str = ""
    """What is wrong and what to do about it; empty where all is well."""


def format_findings(findings: Sequence[Finding]) -> str:
    width = max(len(one.what) for one in findings)
    lines = []
    for one in findings:
        lines.append(f"{'WRONG' if one.problem else 'ok':5}  {one.what:{width}}  {one.found}")
        if one.problem:
            lines.append(f"{'':5}  {'':{width}}  {one.problem}")
    return "\n".join(lines)


def check_sampling(sampler: Policy, config: TrainConfig) -> Finding:
    names = [sampler.names(ids) for ids in (sampler.eos_ids, [sampler.pad_id], sampler.forbidden_ids)]
    is_clear = set(sampler.eos_ids).isdisjoint(sampler.forbidden_ids)
    return Finding(
        "sampling",
        f"temperature {config.temperature}, no top-k or top-p, no penalties, at most {config.max_new_tokens} tokens; EOS "
        f"{names[0]}, pad {names[1]}, never {names[2]}; the checkpoint's generation_config is not used",
        "" if is_clear else "an EOS id is an image marker too: look at the policy's config.json",
    )


def check_templates(texts: dict[str, str]) -> Finding:
    """texts: by model, the end of a prompt as its chat template writes it."""
    thinking = [
        name for name, text in texts.items() if text.rfind("<think>") > text.rfind("</think>")
    ]
    return Finding(
        "templates", f"of {' and '.join(texts)}",
        f"the {thinking[0]}'s opens <think>: it would think where it is to answer; take a model "
        "that does not think, or close it in the chat template with </think>" if thinking else "",
    )


def pixel_setting(sampler: Policy) -> str:
    """The setting, and the file of the checkpoint, that bounds an image's pixels: a processor of
    processor_config.json counts before a file of its own, max_pixels before longest_edge."""
    name, nested = "preprocessor_config.json", json.loads(sampler.files.get("processor_config.json", b"{}"))
    settings = json.loads(sampler.files.get(name, b"{}"))
    if "image_processor" in nested:
        name, settings = "processor_config.json", nested["image_processor"]
    return f"{'longest_edge' if settings.get('max_pixels') is None else 'max_pixels'} in {name}"


def check_lengths(sampler: Policy, image_tokens: Sequence[int], text_tokens: int, verifier_room: int | None,
                  config: TrainConfig) -> Finding:
    """verifier_room: tokens that the verifier has for a caption."""
    room = sampler.model.config.get_text_config().max_position_embeddings
    longest = max(image_tokens) + text_tokens
    ordered = sorted(image_tokens)
    limit = sampler.image_processor.size["longest_edge"]
    pixels = sampler.image_processor.patch_size * sampler.image_processor.merge_size
    problem = ""
    if longest + config.max_new_tokens > room:
        problem = (f"the longest prompt and its caption take {longest + config.max_new_tokens} positions, the policy has "
                   f"{room}: lower --max-new-tokens, or {pixel_setting(sampler)}")
    elif verifier_room is not None and config.max_new_tokens > verifier_room:
        problem = (f"the verifier has room for captions of {verifier_room} tokens: longer ones could not be scored; lower "
                   "--max-new-tokens or take a verifier with a longer context")
    return Finding(
        "tokens",
        f"images {ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}, at most {limit // pixels**2} at this "
        f"processor's {limit} pixels; text {text_tokens}",
        problem,
    )


def check_memory(estimate: dict[str, int], available: int) -> Finding:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in estimate.items() if name != "peak")
    problem = ""
    if estimate["peak"] > SPARE * available:
        problem = ("too much: --gradient-checkpointing, a smaller --micro-batch-tokens, --rollout-tokens or --max-new-tokens, "
                   "--offload-reference, more ranks")
    return Finding("memory", f"peak {_gib(estimate['peak'])} of {_gib(available)} per rank: {parts}", problem)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def available_memory(device: torch.device) -> int:
    """Bytes that this rank can have: of its GPU, what other processes leave; of the host, its share of what is free now
    and of what it holds already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 // world_size() + _resident()


def _resident() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@torch.no_grad()
def check_policy(rollouts: Rollouts, scorer: CompletionScorer, forbidden_ids: Sequence[int]) -> Finding:
    """Sampler and trainer on a trial rollout. Every rank must call this."""
    logprobs, entropies = scorer(rollouts)
    mask = rollouts.completion_mask
    difference = (logprobs - rollouts.logprobs)[mask]
    ratio, gap, worst = difference.exp().mean().item(), difference.abs().mean().item(), difference.abs().max().item()
    ended, entropy = int((~rollouts.truncated).sum()), entropies[mask].mean().item()
    problem = ""
    if not (abs(ratio - 1) < 0.05 and gap < 0.1):
        problem = "sampler and trainer are not one policy: look at precision, chat template and transformers' version"
    elif torch.isin(rollouts.tokens[mask], torch.tensor(forbidden_ids, device=mask.device)).any():
        problem = "the policy wrote image markers"
    return Finding(
        "policy",
        f"{len(rollouts.captions)} captions of up to {rollouts.tokens.shape[1]} tokens, {ended} ended; on-policy ratio "
        f"{ratio:.4f}, gap {gap:.1e} nats, at most {worst:.1e}, entropy {entropy:.2f}; "
        f"the first begins: {rollouts.captions[0][:60]!r}",
        problem,
    )


def check_verifier(scores: dict[str, float]) -> Finding:
    """scores: of `tools.audit.gold_probe`."""
    problem = ""
    if not scores["gold_caption"] > max(0.7, scores["no_caption"] + 0.2):
        problem = "it does not find an answer that it is told: take another verifier, or look at its chat template"
    elif scores["no_caption"] > scores["chance"] + 0.15:
        problem = "questions are answered without a caption: keep those that need the image"
    elif scores["failed_share"]:
        problem = "some questions could not be scored"
    return Finding(
        "verifier",
        f"told the answer {scores['gold_caption']:.2f}, without a caption {scores['no_caption']:.2f}, chance "
        f"{scores['chance']:.2f}; {scores['unparsed_share']:.0%} of the replies unreadable", problem,
    )


def check_disk(folder: Path, num_parameters: int, config: TrainConfig) -> Finding:
    """A checkpoint has 12 bytes per parameter, an export 2 or 4; while one is written, the old ones are there too."""
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    exports = 1 + (config.num_steps // config.export_every if config.export_every else 0)
    width = 2 if config.save_dtype == "bfloat16" else 4
    needed = num_parameters * (12 * (config.keep_checkpoints + 1) + width * (exports + 1))
    problem = "" if needed < free else "too little: lower --keep-checkpoints, raise --export-every, or take another --run-dir"
    return Finding("disk", f"{_gib(needed)} needed of {_gib(free)} free at {there}", problem)


def any_problem(findings: Sequence[Finding]) -> bool:
    """Whether any rank has found something wrong. Every rank must call this."""
    return any(gather_rows([any(one.problem for one in findings)]))


def check(config: TrainConfig) -> None:
    """`--check`: prints what was found on models, data and machine. SystemExit with code 2 if anything is wrong."""
    device = init_distributed(config.timeout_minutes)
    share = config.prompts_per_rank(world_size())
    check_room(Path(config.run_dir))
    parts = f"{share} of {config.prompts_per_step} prompts each, weights in {world_size() // config.replicas} parts"
    findings = [Finding("ranks", f"{world_size()} on {device.type}, {parts}")]
    with all_or_none("data"):
        examples, refused = scan_examples(config.data)
    examples = merge_pictures(examples)
    unreadable, sizes = [], {}
    for example in tqdm(examples[rank() :: world_size()], desc="images", unit="image", disable=rank() != 0):
        try:
            sizes[example.id] = image_size(example.image)
        except ValueError as error:
            unreadable.append(str(error))
    unreadable, sizes = gather_rows(unreadable), dict(gather_rows(list(sizes.items())))
    counts = [len(example.questions) for example in examples]
    bad = [*refused, *unreadable]
    findings.append(Finding(
        "data", f"{len(examples)} images with {min(counts, default=0)} to {max(counts, default=0)} questions, "
        f"{len(read_manifest(config.data))} rows and questions left out as the manifest lists",
        f"{len(refused)} rows and {len(unreadable)} images cannot be used: {'; '.join(bad[:5])}" if bad else "",
    ))
    examples = [example for example in examples if example.id in sizes]
    if bad and len(examples) < config.prompts_per_step:  # too few for a step are left: what was found is the reason
        print0(format_findings(findings))
        raise SystemExit(2)
    with all_or_none("start"):
        check_examples(examples, config)
        reward = load_reward(config, device)
    run = load_run(config, device)
    sampler, verifier = run.sampler, reward.verifier

    findings.append(check_sampling(sampler, config))
    with all_or_none("images"):
        prompts = [sampler.prompt(open_image(example.image)) for example in examples[:2]]
    of_image = [sampler.image_tokens(*size) for size in sizes.values()]
    text_tokens = len(prompts[0].input_ids) - sampler.image_tokens(*sizes[examples[0].id])
    ends = {"policy": sampler.tokenizer.decode(prompts[0].input_ids)}
    if verifier:
        ends["verifier"] = verifier.tokenizer.decode(verifier.writers[config.reward_config.abstain].tail_ids)
    findings.append(check_templates(ends))
    asking_tokens = verifier.prompt_tokens(examples) if verifier else 0
    room = verifier.context - asking_tokens if verifier else None
    findings.append(check_lengths(sampler, of_image, text_tokens, room, config))
    estimate = estimate_memory(
        sampler.model, verifier.model if verifier else None, config, world_size(), device.type == "cuda",
        max(of_image) + text_tokens, max(of_image), asking_tokens,
    )
    findings.append(check_memory(estimate, min(gather_rows([available_memory(device)]))))

    keys = [f"{config.seed}:check:{example.id}:caption:{g}" for example in examples[:2] for g in range(config.group_size)]
    length = min(config.max_new_tokens, TRIAL_TOKENS)
    rollouts = sample_rollouts(sampler, prompts, keys, length, config.temperature, config.rollout_tokens)
    findings.append(check_policy(rollouts, run.scorer, sampler.forbidden_ids))
    if verifier:
        findings.append(check_verifier(gold_probe(examples[: config.probe_images], verifier, config.reward_config)))
    num_parameters = sum(parameter.numel() for parameter in sampler.model.parameters())
    findings.append(check_disk(Path(config.run_dir), num_parameters, config))

    is_wrong = any_problem(findings)
    print0(format_findings(findings))
    if is_wrong:
        raise SystemExit(2)
