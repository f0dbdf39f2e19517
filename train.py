"""GRPO with the CapRL reward (arXiv 2509.22647), the whole loop.

    python train.py toy                                                  # tiny models, a CPU, minutes
    torchrun --nproc-per-node 8 train.py --data qa.jsonl --run-dir runs/caprl-3b       # one node, the paper's settings
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --data qa.jsonl
    torchrun --nproc-per-node 8 train.py --data qa.jsonl --check         # look at everything before the first step
    torchrun --nproc-per-node 8 train.py --data qa.jsonl --resume        # go on after a stop
    python train.py --help                                               # every setting with its source
"""

import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from data.examples import (
    MAX_CHOICES,
    Example,
    examples_hash,
    load_examples,
    merge_pictures,
    read_manifest,
    scan_examples,
)
from data.images import image_size, open_image
from grpo.advantage import group_advantages
from grpo.checkpoint import (
    catch_stop_signals,
    export_policy,
    init_moments_,
    latest_checkpoint,
    load_checkpoint_,
    make_room,
    save_checkpoint,
    training_state,
)
from grpo.config import TrainConfig, parse_train_config, run_program
from grpo.disk import check_room, naming
from grpo.distributed import (
    Phases,
    all_or_none,
    cast_weights_,
    copy_weights_,
    deal,
    empty_model,
    fill_,
    gather_rows,
    init_distributed,
    print0,
    rank,
    shard,
    sum_across_ranks,
    world_size,
)
from grpo.logprobs import CompletionScorer
from grpo.memory import estimate_memory
from grpo.page import write_page
from grpo.policy import TEMPLATE_DATE, Policy, encode_images, load_policy, weights_hash
from grpo.preflight import (
    TRIAL_TOKENS,
    Finding,
    any_problem,
    available_memory,
    check_disk,
    check_lengths,
    check_memory,
    check_policy,
    check_sampling,
    check_templates,
    check_verifier,
    format_findings,
)
from grpo.report import (
    SHOWN_GROUPS,
    check_run_dir,
    check_writer,
    keep_thumbnail,
    log_start,
    log_step,
    log_tensorboard,
    only_writer,
    open_tensorboard,
    rewind,
    saved_config,
    start_run,
)
from grpo.rollout import Rollouts, sample_rollouts
from grpo.update import prepare_training_, update_policy
from reward.audit import audit, gold_probe, probe
from reward.caprl import AskVerifier, RewardConfig, Rewards, caption_rewards, load_verifier
from reward.judge import judge_rewards

RewardFunction = Callable[[Sequence[str], Sequence[Example], Sequence[str], Sequence[int]], Rewards]
"""(captions, each one's example, a key that siblings share, lengths in tokens) -> rewards"""


def step_examples(examples: Sequence[Example], step: int, prompts_per_step: int, seed: int) -> list[Example]:
    """The images of a step: each pass over the data is a new order, and no image comes twice in it.

    The remainder that does not fill a step waits for the next pass, where another remainder does.
    """
    steps_per_pass = len(examples) // prompts_per_step
    if steps_per_pass == 0:
        raise ValueError(f"prompts_per_step {prompts_per_step}: expected at most the {len(examples)} images there are")
    number, place = divmod(step, steps_per_pass)
    order = list(range(len(examples)))
    random.Random(f"{seed}:pass:{number}").shuffle(order)
    return [examples[i] for i in order[place * prompts_per_step : (place + 1) * prompts_per_step]]


def my_share(sampler: Policy, batch: Sequence[Example]) -> list[Example]:
    """This rank's images of a step: as many as every rank's, with about as many image tokens. Whole groups stay on one rank, so
    nothing has to be exchanged."""
    if world_size() == 1:
        return list(batch)
    with all_or_none("images"):
        sizes = [sampler.image_tokens(*image_size(example.image)) for example in batch]
    return [batch[place] for place in deal(sizes, world_size())[rank()]]


def sample_step(sampler: Policy, batch: Sequence[Example], step: int, config: TrainConfig) -> Rollouts:
    """G captions of each image."""
    with all_or_none("images"):
        prompts = [sampler.prompt(open_image(example.image)) for example in batch]
    if config.freeze == "vision+merger":  # the reference's tower, the policy's and the sampler's are one for the whole run
        prompts = encode_images(sampler, prompts)
    keys = [f"{config.seed}:{step}:{example.id}:caption:{g}" for example in batch for g in range(config.group_size)]
    with all_or_none("rollout"):
        return sample_rollouts(sampler, prompts, keys, config.max_new_tokens, config.temperature, config.rollout_tokens)


def reward_metrics(rollouts: Rollouts, result: Rewards) -> dict[str, float]:
    """Means over all ranks' captions and groups."""
    rewards = result.rewards
    groups = rewards.view(-1, rollouts.group_size)  # (P, G)
    scored = ~rewards.isnan()
    flat = (groups.nan_to_num(torch.inf).amin(1) - groups.nan_to_num(-torch.inf).amax(1)).abs() < 1e-6
    # A rank without a measurement of something leaves it to the others.
    known = {key: (value, len(rewards)) for key, value in result.stats.items() if math.isfinite(value)}
    counts = {key: known.get(key, (0.0, 0)) for key in result.stats}
    sums = sum_across_ranks(
        {
            "reward": rewards[scored].sum().item(), "scored": scored.sum().item(), "captions": len(rewards),
            "length": rollouts.lengths.sum().item(), "truncated_share": rollouts.truncated.sum().item(),
            "flat_groups": flat.sum().item(), "groups": len(groups),
        } | {key: value * count for key, (value, count) in counts.items()}
        | {f"captions of {key}": count for key, (_, count) in counts.items()}
        | {f"reward_{key}": part[scored].sum().item() for key, part in result.parts.items()}
    )
    captions, groups_seen, num_scored = sums.pop("captions"), sums.pop("groups"), sums.pop("scored")
    stats = {key: sums.pop(key) / (sums.pop(f"captions of {key}") or math.nan) for key in counts}
    flat_groups = sums.pop("flat_groups") / (groups_seen if num_scored else math.nan)
    return {"flat_groups": flat_groups, "unscored_captions": captions - num_scored} | stats | {
        key: value / (num_scored or math.nan) if key.startswith("reward") else value / captions for key, value in sums.items()
    }


def load_reward(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> tuple[RewardFunction, AskVerifier | None]:
    """The reward and, where it is CapRL's, its verifier."""
    if config.reward == "judge":
        return partial(judge_rewards, judge=load_policy(config.judge, device, dtype, writes=False)), None
    verifier = load_verifier(
        config.verifier, device, dtype, mode=config.verifier_mode, temperature=config.verifier_temperature,
        max_new_tokens=config.verifier_max_new_tokens,
    )
    return partial(caption_rewards, verifier=verifier, config=reward_settings(config)), verifier


def reward_settings(config: TrainConfig) -> RewardConfig:
    given = asdict(config)
    return RewardConfig(**{field.name: given[field.name] for field in fields(RewardConfig)})


def check_rewards(result: Rewards, failed_share: float, config: TrainConfig) -> None:
    """Raises ValueError, on all ranks alike, if too many questions of the step could not be scored."""
    if failed_share > config.max_failed_share:
        reasons = {one["failure"] for record in result.records for one in record if one["failure"]}
        reasons = sorted(set(gather_rows(sorted(reasons))))
        raise ValueError(f"{failed_share:.0%} of the step's questions could not be scored ({'; '.join(reasons[:3])})")


def audit_step(rows: list[dict], step: int, sampler: Policy, verifier: AskVerifier | None, probe_set: Sequence[Example],
               config: TrainConfig) -> dict:
    """The audit of the step's captions and, every `audit_every` steps and at the last, of the policy's captions of the
    probe set."""
    found = audit(rows)
    is_due = config.audit_every and (step % config.audit_every == 0 or step + 1 == config.num_steps)
    if verifier is not None and is_due and len(probe_set) > 1:
        prompts = [sampler.prompt(open_image(example.image)) for example in probe_set]
        keys = [f"{config.seed}:probe:{example.id}:caption" for example in probe_set]
        captions = sample_rollouts(
            sampler, prompts, keys, config.max_new_tokens, config.temperature, config.rollout_tokens
        ).captions
        found |= probe(captions, probe_set, verifier, reward_settings(config), config.seed)
    return found


@dataclass(frozen=True)
class Run:
    """What a run works with, on this rank."""

    device: torch.device
    examples: list[Example]
    sampler: Policy
    """Writes the captions: a full copy in the compute dtype, except on a single CPU, where it is the trained model itself."""
    scorer: CompletionScorer
    """The trained model, float32, sharded."""
    reference: CompletionScorer | None
    """The initial policy, frozen, sharded, in the compute dtype."""
    optimizer: torch.optim.AdamW
    reward: RewardFunction
    verifier: AskVerifier | None

    @property
    def is_shared(self) -> bool:
        return self.scorer.model is self.sampler.model


def check_examples(examples: Sequence[Example], config: TrainConfig) -> None:
    """Raises ValueError for sets that do not fit the settings."""
    full = [example.id for example in examples if any(len(q.choices) == MAX_CHOICES for q in example.questions)]
    if config.abstain and full:
        raise ValueError(f"abstain: expected at most {MAX_CHOICES - 1} choices beside it, id {full[0]!r} has {MAX_CHOICES}")
    step_examples(examples, 0, config.prompts_per_step, config.seed)  # too few images: say so before models are loaded


def load_run(config: TrainConfig, device: torch.device, examples: list[Example]) -> Run:
    """Models, sharded. Raises ValueError, on all ranks, for whatever cannot be used."""
    is_shared = world_size() == 1 and device.type == "cpu"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.offload_reference and device.type == "cpu":
        raise ValueError("offload_reference: expected GPUs, there is nothing to offload from")
    with all_or_none("start"):
        check_examples(examples, config)
        sampler = load_policy(config.policy, device, torch.float32 if is_shared else "auto")
        reward, verifier = load_reward(config, device, dtype)
    score = dict(pad_id=sampler.pad_id, forbidden_ids=sampler.forbidden_ids, temperature=config.temperature)

    def scorer_of(model: PreTrainedModel, offload: bool = False) -> CompletionScorer:
        scorer = shard(CompletionScorer(model, **score), device, config.replicas, offload)
        fill_(scorer, sampler.model, device, offload)
        return scorer

    if is_shared:
        prepare_training_(sampler.model, config)
        scorer = CompletionScorer(sampler.model, **score)
    else:
        model = empty_model(sampler.model, torch.float32)
        prepare_training_(model, config)
        scorer = scorer_of(model)
    reference = None
    if config.kl_coef > 0 and is_shared:
        reference = CompletionScorer(load_policy(config.policy, device).model.requires_grad_(False), **score)
    elif config.kl_coef > 0:
        reference = scorer_of(empty_model(sampler.model, dtype).requires_grad_(False), config.offload_reference)
    if not is_shared:
        cast_weights_(sampler.model, dtype)  # after the masters took them as they were saved
    optimizer = torch.optim.AdamW(
        [p for p in scorer.parameters() if p.requires_grad], lr=config.learning_rate, betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
    )
    init_moments_(optimizer)
    return Run(device, examples, sampler, scorer, reference, optimizer, reward, verifier)


def contents_of(run: Run) -> dict[str, str]:
    """What settings only name, before the first step: the rows, and the weights of all models."""
    contents = {"data": f"{len(run.examples)} images, {examples_hash(run.examples)}"}
    given = {"policy": run.sampler} | getattr(run.reward, "keywords", {})  # verifier or judge
    return contents | {
        name: weights_hash(one.model) for name, one in given.items() if hasattr(one, "model")
    }


def begin(run_dir: Path, run: Run, config: TrainConfig) -> int:
    """Makes the run folder, or takes folder and models back to the latest checkpoint; returns the number of steps done."""
    state = training_state(run.scorer, run.optimizer)
    with all_or_none("resume"):
        contents = contents_of(run) if rank() == 0 else {}
        config.check_resumes(saved_config(run_dir), contents)
        found = latest_checkpoint(run_dir) if config.resume else None
        if config.resume and not found and (run_dir / "final").exists():
            raise ValueError(f"{run_dir}: expected a checkpoint to go on from, found a finished run without any")
    if found:
        folder, num_steps = found
        with all_or_none("resume"):
            load_checkpoint_(folder, state)
        if not run.is_shared:
            copy_weights_(run.scorer, run.sampler.model)
        print0(f"resumed from {folder}")
    else:
        num_steps = 0
    with all_or_none("resume"), naming(run_dir):
        if rank() == 0:
            make_room(run_dir, state)
            fixed = {"contents": contents, "template_date": TEMPLATE_DATE.isoformat()}
            start_run(run_dir, asdict(config) | fixed)
            rewind(run_dir, num_steps)
            log_start(run_dir, num_steps, world_size())
    return num_steps


def train(config: TrainConfig) -> Path:
    """Runs the whole of it and returns the folder of the trained policy."""
    device = init_distributed(config.timeout_minutes)
    run_dir = Path(config.run_dir)
    config.prompts_per_rank(world_size())
    with ExitStack() as stack:
        with all_or_none("run folder"):  # before minutes are spent on models
            if not config.resume:
                check_run_dir(run_dir)
            check_room(run_dir)
            if rank() == 0:
                stack.enter_context(only_writer(run_dir))
        with all_or_none("data"):
            examples = load_examples(config.data)
        examples = merge_pictures(examples)
        run = load_run(config, device, examples)
        take_steps(run_dir, run, begin(run_dir, run, config), config)
        export(run, run_dir / "final", config)
        print0(f"trained policy: {run_dir / 'final'}")
        if rank() == 0:
            print0(f"report: {write_page(run_dir)}")
    return run_dir / "final"


def take_steps(run_dir: Path, run: Run, first_step: int, config: TrainConfig) -> None:
    """The loop. SIGTERM and SIGINT end it after the step, with a checkpoint: SystemExit with the
    shell's code for that signal."""
    sampler, scorer = run.sampler, run.scorer
    print0(f"{len(run.examples)} images, {world_size()} rank(s) on {run.device.type}, {config}")
    if listed := read_manifest(config.data):
        print0(f"{len(listed)} rows and questions of {config.data} are left out, as its manifest lists")
    print0(
        f"sampling: temperature {config.temperature}, no top-k or top-p, at most {config.max_new_tokens} tokens, "
        f"EOS {sampler.names(sampler.eos_ids)}, never {sampler.names(sampler.forbidden_ids)}; the checkpoint's "
        "generation_config is not used"
    )
    tensorboard = open_tensorboard(run_dir, first_step) if config.tensorboard and rank() == 0 else None
    phases = Phases(run.device, config.timeout_minutes)
    saved_at, skipped_in_a_row = time.monotonic(), 0
    bar = tqdm(range(first_step, config.num_steps), desc="train", unit="step", disable=rank() != 0)
    step = first_step
    with catch_stop_signals(lambda: step) as signals:
        for step in bar:
            started = time.perf_counter()
            batch = step_examples(run.examples, step, config.prompts_per_step, config.seed)

            # 1. The policy writes G captions of each image.
            with phases("rollout"):
                mine = my_share(sampler, batch)
                rollouts = sample_step(sampler, mine, step, config)

            # 2. The verifier answers questions from each caption; captions of one image get the same ones.
            with phases("reward"):
                by_caption = [example for example in mine for _ in range(config.group_size)]
                keys = [f"{config.seed}:{step}:{example.id}" for example in by_caption]
                result = run.reward(rollouts.captions, by_caption, keys, rollouts.lengths.tolist())
                rewards = result.rewards.to(run.device)  # (B,), NaN where it could not be measured
                measured = reward_metrics(rollouts, result)
                check_rewards(result, measured.get("failed_share", 0.0), config)

            # 3. A caption is as good as it is better than its siblings.
            advantages = group_advantages(rewards, config.group_size, config.leave_one_out, config.scale_by_std)  # (B,)

            # 4. The clipped surrogate with the KL penalty, and the step.
            with phases("update"):
                for group in run.optimizer.param_groups:
                    group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
                metrics = update_policy(scorer, run.reference, run.optimizer, rollouts, advantages, ~rewards.isnan(), config)

            # 5. The sampler gets the new weights.
            with phases("weights"):
                if not run.is_shared:
                    copy_weights_(scorer, sampler.model)

            # 6. What was seen is written down, and what was learnt is saved.
            with phases("records"):
                metrics = measured | metrics
                rows = gather_rows(rollout_rows(by_caption, rollouts, result, advantages))
                with all_or_none("records"):
                    if rank() == 0:
                        check_writer(run_dir)
                        order = {example.id: place for place, example in enumerate(batch)}
                        rows.sort(key=lambda row: order[row["id"]])  # as on one rank
                        probes = run.examples[: config.probe_images]
                        found = audit_step(rows, step, sampler, run.verifier, probes, config)
                        for example in batch[:SHOWN_GROUPS]:
                            keep_thumbnail(run_dir, example.id, partial(open_image, example.image))
            timing = phases.take() | {"seconds": time.perf_counter() - started}
            num_tokens = metrics["length"] * config.prompts_per_step * config.group_size
            timing["tokens_per_second"] = num_tokens / timing["seconds"] / world_size()
            with all_or_none("log"), naming(run_dir):
                if rank() == 0:
                    bar.write(log_step(run_dir, step, metrics, found, timing, rows))
                    if tensorboard:
                        log_tensorboard(tensorboard, run_dir, step, metrics, found, timing, rows)
                    for sentence in alarms(metrics):
                        bar.write(f"    {sentence}")

            skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
            if metrics["skipped"]:
                print0(f"    step {step} was left out, its gradient is not finite; images: {[e.id for e in batch]}")
            if skipped_in_a_row >= config.max_skipped:
                raise ValueError(f"{skipped_in_a_row} steps in a row without a finite gradient; the last images: "
                                 f"{[e.id for e in batch]}; the checkpoints in {run_dir / 'checkpoints'} are from before")
            is_last = step + 1 == config.num_steps
            is_due = config.save_every and (step + 1) % config.save_every == 0
            is_late = config.save_minutes and time.monotonic() - saved_at > 60 * config.save_minutes
            agreed = sum_across_ranks({"stop": len(signals), "late": bool(is_late)})  # a clock or a signal is one rank's
            if is_last or is_due or agreed["stop"] or agreed["late"]:
                save_checkpoint(run_dir, step + 1, training_state(scorer, run.optimizer), config.keep_checkpoints)
                saved_at = time.monotonic()
            if config.export_every and (step + 1) % config.export_every == 0 and not is_last:
                export(run, run_dir / "export" / f"step_{step + 1:06d}", config)
            if agreed["stop"] and not is_last:
                print0(f"stopped after step {step}; --resume goes on from there")
                raise SystemExit(128 + max(gather_rows(signals)))


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
    run = load_run(config, device, examples)
    sampler = run.sampler

    findings.append(check_sampling(sampler, config))
    with all_or_none("images"):
        prompts = [sampler.prompt(open_image(example.image)) for example in examples[:2]]
    of_image = [sampler.image_tokens(*size) for size in sizes.values()]
    text_tokens = len(prompts[0].input_ids) - sampler.image_tokens(*sizes[examples[0].id])
    ends = {"policy": sampler.tokenizer.decode(prompts[0].input_ids)}
    if run.verifier:
        ends["verifier"] = run.verifier.tokenizer.decode(run.verifier.writers[config.abstain].tail_ids)
    findings.append(check_templates(ends))
    asking_tokens = run.verifier.prompt_tokens(examples) if run.verifier else 0
    room = run.verifier.context - asking_tokens if run.verifier else None
    findings.append(check_lengths(sampler, of_image, text_tokens, room, config))
    estimate = estimate_memory(
        sampler.model, run.verifier.model if run.verifier else None, config, world_size(), device.type == "cuda",
        max(of_image) + text_tokens, max(of_image), asking_tokens,
    )
    findings.append(check_memory(estimate, min(gather_rows([available_memory(device)]))))

    keys = [f"{config.seed}:check:{example.id}:caption:{g}" for example in examples[:2] for g in range(config.group_size)]
    length = min(config.max_new_tokens, TRIAL_TOKENS)
    rollouts = sample_rollouts(sampler, prompts, keys, length, config.temperature, config.rollout_tokens)
    findings.append(check_policy(rollouts, run.scorer, sampler.forbidden_ids))
    if run.verifier:
        findings.append(check_verifier(gold_probe(examples[: config.probe_images], run.verifier, reward_settings(config))))
    num_parameters = sum(parameter.numel() for parameter in sampler.model.parameters())
    findings.append(check_disk(Path(config.run_dir), num_parameters, config))

    is_wrong = any_problem(findings)
    print0(format_findings(findings))
    if is_wrong:
        raise SystemExit(2)


def export(run: Run, folder: Path, config: TrainConfig) -> None:
    with all_or_none("export"):  # the others wait: nobody leaves while it is written
        if rank() == 0:
            dtype = getattr(torch, config.save_dtype)
            export_policy(run.sampler, folder, dtype, config.temperature, config.max_new_tokens)


def alarms(metrics: dict[str, float]) -> list[str]:
    """A sentence of advice on each number that has left the range in which runs go well; the limits are ours."""
    limits = {
        "ratio": (abs(metrics["ratio"] - 1) > 0.05,
                  "sampler and trainer disagree, or steps are long: leave out --sampler-logprobs, or lower --learning-rate "
                  "or --inner-epochs"),
        "sampler_gap": (metrics["sampler_gap"] > 0.1,
                        "nats between the sampler and the policy that is trained: look at its precision"),
        "kl": (metrics.get("kl", 0.0) > 0.5, "far from the initial policy: raise --kl-coef or lower --learning-rate"),
        "truncated_share": (metrics["truncated_share"] > 0.5,
                            "most captions are cut off: raise --max-new-tokens or give a --length-weight"),
        "flat_groups": (metrics["flat_groups"] > 0.9, "hardly any group teaches: raise --num-questions or change the data"),
    }
    return [f"{name} {metrics[name]:.3f}: {advice}" for name, (is_out, advice) in limits.items() if is_out]


def rollout_rows(examples: Sequence[Example], rollouts: Rollouts, result: Rewards, advantages: Tensor) -> list[dict]:
    """What a reader wants to see of each caption: the words, what was asked and answered, what it earned and for what."""
    columns = zip(
        examples, rollouts.captions, rollouts.lengths.tolist(), rollouts.truncated.tolist(), result.rewards.tolist(),
        advantages.tolist(), result.records, strict=True,
    )
    return [
        {"id": example.id, "family": example.family, "caption": caption, "length": length, "truncated": truncated,
         "reward": reward, "parts": {key: part[row].item() for key, part in result.parts.items()}, "advantage": advantage,
         "questions": questions}
        for row, (example, caption, length, truncated, reward, advantage, questions) in enumerate(columns)
    ]


def main(arguments: list[str]) -> None:
    config = parse_train_config(arguments)
    with naming(Path(config.run_dir)):
        check(config) if config.check else train(config)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
