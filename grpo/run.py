"""The models and the state of a training run: loaded, begun or resumed, exported."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.io import naming
from grpo.config import TrainConfig
from grpo.distributed import (
    all_or_none,
    check_alike,
    compute_dtype,
    gather_rows,
    print0,
    rank,
    world_size,
)
from grpo.logprobs import CompletionScorer
from grpo.policy import Policy, Prompt, encode_images
from grpo.rollout import Rollouts, sample_rollouts
from grpo.update import init_moments_, prepare_training_


@dataclass(frozen=True)
class Run:
    """The models of a run, on this rank."""

    device: torch.device
    sampler: Policy
    """Writes the captions. It is an unsharded copy in the compute dtype. On a single CPU, and with
    adapters, it is the trained model itself."""
    scorer: CompletionScorer
    """The trained model, float32, sharded. With adapters it is whole, and only they are float32."""
    reference: Callable[..., tuple[Tensor, Tensor]] | None
    """Scores like `scorer`, by the initial policy: frozen, sharded, in the compute dtype. With
    adapters it is `scorer` without them. None without a KL term."""
    optimizer: torch.optim.AdamW

    @property
    def is_tower_frozen(self) -> bool:
        """Whether no step changes the vision tower: then all models have the same features."""
        tower = self.scorer.model.model.visual
        return not any(parameter.requires_grad for parameter in tower.parameters())

    def update_sampler_(self) -> None:
        """Copies the trainer's weights into the sampler. Every rank must call this."""
        if self.scorer.model is not self.sampler.model:
            from grpo.sharding import copy_weights_  # here: as in `load_run`

            copy_weights_(self.scorer, self.sampler.model)


def load_run(config: TrainConfig, device: torch.device) -> Run:
    """Loads the models and shards them. Raises ValueError, on all ranks, if one cannot be used."""
    from grpo.layers import check_layers  # here: a reader of training need not meet it
    from grpo.pretrained import load_policy  # here: how checkpoints are read is a page of its own

    has_one_model = world_size() == 1 and device.type == "cpu"  # the sampler is the trained model
    dtype, has_adapters = compute_dtype(device), config.lora.lora_rank > 0
    if config.offload_reference and device.type == "cpu":
        raise ValueError("offload_reference: expected GPUs, there is nothing to offload from")
    with all_or_none("start"):
        # On a CPU any number of ranks loads float32, as one does: a merged adapter is not rounded.
        load_dtype = dtype if has_adapters or device.type == "cpu" else "auto"
        sampler = load_policy(config.policy, device, load_dtype)
        check_layers(sampler.model, config.max_new_tokens)  # before the run folder is begun
        if has_adapters:
            from grpo.lora import adapters_off, add_adapters_  # here: for who asks for adapters

            add_adapters_(sampler.model, config.lora, config.freeze, config.seed)

    def scorer_of(model: PreTrainedModel) -> CompletionScorer:
        return CompletionScorer(model, sampler.forbidden_ids, config.temperature)

    reference = None
    if has_adapters or has_one_model:
        prepare_training_(sampler.model, config)
        scorer = scorer_of(sampler.model)
        if has_adapters and config.kl_coef > 0:
            reference = adapters_off(sampler.model)(scorer)
        elif config.kl_coef > 0:
            reference = scorer_of(load_policy(config.policy, device).model.requires_grad_(False))
    else:
        # here: how a model is sharded is a page of its own
        from grpo.sharding import cast_weights_, empty_model, fill_, rank_mesh, shard

        mesh = rank_mesh(device, config.replicas)  # one: each keeps buffers for its messages

        def sharded(model: PreTrainedModel, offload: bool = False) -> CompletionScorer:
            scorer = shard(scorer_of(model), mesh, offload)
            fill_(scorer, sampler.model, device, offload)
            return scorer

        model = empty_model(sampler.model, torch.float32)
        prepare_training_(model, config)
        scorer = sharded(model)
        if config.kl_coef > 0:
            model = empty_model(sampler.model, dtype).requires_grad_(False)
            reference = sharded(model, config.offload_reference)
        cast_weights_(sampler.model, dtype)  # last: the float32 masters need the weights as saved
    trained = [parameter for parameter in scorer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=config.weight_decay,
                                  fused=device.type == "cuda" or None)
    init_moments_(optimizer)
    return Run(device, sampler, scorer, reference, optimizer)


def begin(run_dir: Path, run: Run, config: TrainConfig, contents: dict[str, str]) -> int:
    """Makes the run folder, or takes folder and models back to the latest checkpoint. Returns the
    number of steps done.

    contents: hashes of `data` and of the models. Raises ValueError, on all ranks, if they differ
    between ranks or the folder does, if the run cannot go on or there is no room for a checkpoint.
    """
    # here: files are no part of the algorithm
    from grpo.checkpoint import latest_checkpoint, load_checkpoint_, make_room, training_state
    from grpo.run_dir import check_resumes, check_shared, log_start, rewind, saved_config, start_run
    from grpo.template_date import TEMPLATE_DATE  # here: for config.json alone

    check_shared(run_dir)
    check_alike(contents)  # else one policy is made of the weights of two
    state = training_state(run.scorer, run.optimizer)
    with all_or_none("resume"):
        saved = saved_config(run_dir)
        check_resumes(config, saved, contents)
        # One rank looks: on another node the link may still lead to the checkpoint before.
        latest = latest_checkpoint(run_dir) if config.resume and rank() == 0 else None
        if latest and not saved:
            raise ValueError(f"{run_dir / 'config.json'}: expected the settings of the run to "
                             f"resume, found none beside {latest[0]}")
    checkpoint, num_steps = gather_rows([latest])[0], 0
    if checkpoint:
        path, num_steps = checkpoint
        folder = run_dir / "checkpoints" / path.name  # the run folder's path may differ by rank
        with all_or_none("resume"):
            load_checkpoint_(folder, state)
        run.update_sampler_()
        print0(f"resumed from {folder}")
    with all_or_none("resume"), naming(run_dir):
        if rank() == 0:
            make_room(run_dir, state)
            fixed = {"contents": contents, "template_date": TEMPLATE_DATE.isoformat()}
            rewind(run_dir, num_steps)
            start_run(run_dir, config.flat() | fixed)
            log_start(run_dir, num_steps, world_size())
    exported = run_dir / "export" / f"step_{num_steps:06d}"
    if is_exported(num_steps, config) and not gather_rows([exported.exists()])[0]:
        export(run, exported, config)  # the run was stopped between its checkpoint and this
    return num_steps


def sample_step(run: Run, examples: Sequence, prompts: Sequence[Prompt], step: int | str,
                config: TrainConfig) -> Rollouts:
    """The policy's G captions of each image. A caption's draws are a function of the seed, the
    step or its name, the image's `id` and the caption's place in its group."""
    prompts = [prompt.on(run.sampler.model) for prompt in prompts]
    if run.is_tower_frozen:
        prompts = encode_images(run.sampler, prompts)
    names = [f"{config.seed}:{step}:{example.id}:caption" for example in examples]
    keys = [f"{name}:{g}" for name in names for g in range(config.group_size)]
    return sample_rollouts(run.sampler, prompts, keys, config.max_new_tokens, config.temperature,
                           config.rollout_tokens)


def save_step(run_dir: Path, run: Run, step: int, saved_at: float, signals: list[int],
              config: TrainConfig) -> float:
    """Saves a checkpoint and an export after a step if they are due. Every rank must call this.

    saved_at: `time.monotonic()` at the last checkpoint or, before it, at the start. Returns its new
    value. Raises SystemExit, with the shell's code for the signal, if a rank was told to stop.
    """
    from grpo.checkpoint import save_checkpoint, training_state  # here: as in `begin`

    num_steps = step + 1
    is_last = num_steps == config.num_steps
    is_due = config.save_every and num_steps % config.save_every == 0
    is_late = config.save_minutes and time.monotonic() - saved_at > 60 * config.save_minutes
    # Clocks and signals differ by rank: all ranks decide together.
    told, is_late = gather_rows(signals), any(gather_rows([is_late]))
    if is_last or is_due or told or is_late:
        state = training_state(run.scorer, run.optimizer)
        save_checkpoint(run_dir, num_steps, state, config.keep_checkpoints)
        saved_at = time.monotonic()
    if is_exported(num_steps, config):
        export(run, run_dir / "export" / f"step_{num_steps:06d}", config)
    if told and not is_last:
        print0(f"stopped after step {step}; --resume goes on from there")
        raise SystemExit(128 + max(told))
    return saved_at


def is_exported(num_steps: int, config: TrainConfig) -> bool:
    every = config.export_every
    return bool(every) and 0 < num_steps < config.num_steps and num_steps % every == 0


def export(run: Run, folder: Path, config: TrainConfig, about: dict | None = None) -> None:
    """Rank 0 writes the policy as a Hugging Face folder (`export_policy`); the others wait."""
    from grpo.export import export_policy  # here: a reader of training need not meet it

    with all_or_none("export"):
        if rank() == 0:
            dtype = getattr(torch, config.save_dtype)
            export_policy(run.sampler, folder, dtype, config.temperature, config.max_new_tokens,
                          about)
