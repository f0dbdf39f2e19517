"""Settings of a training run.

Sources: [P] the paper, arXiv 2509.22647; [C1] the released CapRL-3B launch and reward scripts;
[C++] the CapRL++ release, arXiv 2606.09393; [GRPO] DeepSeekMath, arXiv 2402.03300; [LoRA] Schulman
and Thinking Machines Lab, "LoRA Without Regret", 2025.
A value without a source says "ours" and why. grpo/recipes.py has the presets.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from data.ranges import check_range
from grpo.loss import RatioOf, Reduction


@dataclass(frozen=True)
class RewardConfig:
    """How a caption is measured, by reward/caprl.py."""

    num_questions: int = 4
    """N, questions per caption. [P]: 8 are no better, 48.3 against 48.4. Evaluations also take 0,
    which is all questions of the image."""
    question_draw: Literal["paired", "independent"] = "paired"
    """paired: all captions of an image get the same questions and shuffles. They are drawn without
    replacement while they last. independent: each caption draws its own, with replacement
    [C1, C++]. Ours: paired, see docs/results.md."""
    num_shuffles: int = 1
    """Each question is asked under this many shuffles of its options [P]; 0: once, its options as
    the data have them, as in the first released script."""
    abstain: bool = False
    """Add the option "The caption does not say", which is never right. Here it is shuffled with the
    others; in [C1] it is always last."""
    soft: bool = False
    """A question earns the right option's probability. Needs verifier_mode "logits". Ours: off."""
    length_weight: float = 0.0
    """Weight of a length term that is added to the accuracy. The term is 1 from length_low to
    length_full tokens. Below it falls to 0 at no token, above to 0 at length_zero. [C++] 0.2"""
    length_low: int = 0
    """Tokens from which the length term is 1. [C++] has no such side. BalCapRL (arXiv 2605.07394)
    masks a reward outside a band around a reference's length. Ours: 0, no lower side."""
    length_full: int = 2048
    """Tokens up to which the length term is 1. [C++]"""
    length_zero: int = 3072
    """Tokens from which the length term is 0. [C++]"""
    repetition_weight: float = 0.0
    """Weight of a penalty: the share of repeated 4-grams. Ours: off."""
    praise_weight: float = 0.0
    """Weight of a penalty: the share of sentences that praise the caption itself, leave open
    whether they hold, or were said before (reward/style.py). The first two are known in English
    alone. Ours: off."""
    correctness_weight: float = 0.0
    """Weight of the mean probability of a caption's claims, as a model that sees the image judges
    them (reward/claims.py). BalCapRL (arXiv 2605.07394) rewards it too. Ours: off."""
    checker: str = ""
    """The vision-language model that judges the claims, read with a correctness_weight only; ""
    takes the initial policy."""
    checker_mode: Literal["yes", "likelihood"] = "yes"
    """yes: is the claim true? likelihood: how much likelier it writes the claim with the image than
    without, for a model that was not taught to judge. Ours."""

    def __post_init__(self):
        check_range(self, "num_questions num_shuffles length_weight repetition_weight "
                    "praise_weight length_low correctness_weight", at_least=0)
        lengths = self.length_low, self.length_full, self.length_zero
        if not self.length_low <= self.length_full < self.length_zero:
            raise ValueError(f"expected length_low <= length_full < length_zero, got {lengths}")

    @property
    def has_other_parts(self) -> bool:
        """Whether anything beside the accuracy is rewarded, by the settings called ..._weight."""
        return any(value for name, value in vars(self).items() if name.endswith("_weight"))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters are trained in place of all weights, by grpo/lora.py."""

    lora_rank: int = 0
    """R, the rank of the adapters; 0 trains all weights. One copy of the model is then sampler,
    trainer and reference, for a GPU of 24 to 48 GB. The best learning rate is about ten times that
    of full training [LoRA]. Ours: off."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_rank. [LoRA]"""
    lora_targets: str = r"language_model\..*_proj"
    """Which linear layers get an adapter: a regular expression for the end of their names. Layers
    that `freeze` names get none. Ours: all of the language model's."""

    def __post_init__(self):
        check_range(self, "lora_rank", at_least=0)
        check_range(self, "lora_alpha", above=0)
        others = self.lora_alpha, self.lora_targets
        if not self.lora_rank and others != (LoraConfig.lora_alpha, LoraConfig.lora_targets):
            raise ValueError("lora_rank 0: expected 1 or more beside lora_alpha or lora_targets; "
                             "without adapters all weights are trained")


@dataclass(frozen=True)
class HeldOutConfig:
    """How a run is measured on images that it is not trained on, by tools/held_out.py."""

    eval_data: str = ""
    """Images whose questions measure the policy now and then: a file or a benchmark, as evaluate.py
    takes it, or a share of `data`, such as 0.02. None of its images is trained on. Ours: none."""
    eval_every: int = 50
    """Steps between two evaluations, beside those before the first step and after the last. The
    policy of the best one is exported to run_dir/best. Ours."""
    eval_images: int = 0
    """Only the first so many images of eval_data; 0 for all. Ours."""
    eval_samples: int = 4
    """Captions of each image, sampled as in training [P]; 0 for one of the likeliest tokens."""
    patience: int = 0
    """The run ends after this many evaluations without a better one; 0 for never. Ours."""
    stop_at: float = 0.0
    """The run ends at an evaluation of at least this accuracy; 0 for never. Ours."""

    def __post_init__(self):
        check_range(self, "eval_every", at_least=1)
        check_range(self, "eval_images eval_samples patience", at_least=0)
        check_range(self, "stop_at", at_least=0, at_most=1)
        if (self.patience or self.stop_at) and not self.eval_data:
            raise ValueError("patience and stop_at: expected eval_data too, they count evaluations")


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the paper's main run; where the paper is silent, the released scripts'."""

    # models and data
    policy: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """The captioner to train, a local folder or a hub name. [P] An adapter on another base than its
    adapter_config.json names is ADAPTER+BASE."""
    verifier: str = "Qwen/Qwen2.5-3B-Instruct"
    """The text-only model that answers from captions [P]; http://HOST:8000/v1 asks a server."""
    verifier_name: str = ""
    """The model's name at that server; NAME=FOLDER says where its tokenizer is."""
    data: str = "caprl-qa.jsonl"
    """A file or folder of images with questions (docs/formats.md), or toy:SPLIT:NUM."""
    run_dir: str = "runs/caprl"
    """The folder that the run writes to. A folder with a run in it is refused, unless resumed."""

    # rollout
    prompts_per_step: int = 128
    """P, images per step, over all ranks. [C1]"""
    group_size: int = 8
    """G, captions per image. [C1]"""
    max_new_tokens: int = 4096
    """The longest caption, in tokens. [C1]"""
    temperature: float = 1.0
    """Temperature of sampling and of all log-probabilities. [C1]"""
    resample_flat: int = 0
    """Images whose captions all earn the same teach nothing: they are replaced by others, at most
    this many times in a step. DAPO's dynamic sampling (arXiv 2503.14476, section 3.2). Ours: off,
    [P] has none."""

    # reward
    reward: Literal["caprl", "judge"] = "caprl"
    """caprl: the share of questions that are answered right from the caption. judge: the baseline.
    A model that sees the image rates the caption. [P] has both."""
    judge: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """The vision-language judge, read with reward "judge" only. [P]; the size is ours."""
    reward_config: Annotated[RewardConfig, tyro.conf.OmitArgPrefixes] = RewardConfig()
    verifier_mode: Literal["sample", "logits"] = "sample"
    """How the verifier answers. sample: its sampled reply is parsed [C1]. Words that take an answer
    back are known in English and Chinese. logits: the likeliest of the offered letters."""
    verifier_temperature: float = 0.6
    """Temperature of the verifier's replies in mode "sample". [C1]"""
    verifier_max_new_tokens: int = 10
    """The longest reply in mode "sample", in tokens. [C1]"""
    max_failed_share: float = 0.1
    """The run stops if a larger share of a step's questions could not be scored. Ours."""
    audit_every: int = 50
    """Steps between two audits of floors and shuffles on the probe images; 0 for none. Ours."""
    probe_images: int = 16
    """Images that audits use, the first of the data. Ours."""

    # advantage
    leave_one_out: bool = False
    """The baseline is the mean of the group's other rewards [C1], not of all its rewards [P]. All
    advantages of a group of n measured captions become n / (n - 1) times larger, no more."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation. [P]"""
    normalize_parts: bool = False
    """Each part of the reward is compared within its group by itself, then weighted and added
    (GDPO, arXiv 2601.05242). A part that varies more then does not drown the others. Ours: off."""

    # loss
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low. Ours: PPO's usual value, not found in [P]."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high. Ours: PPO's usual value, not found in [P]."""
    kl_coef: float = 0.04
    """Weight of the KL to the frozen initial policy; 0 loads no reference. [P] has the term, the
    value is [GRPO]'s."""
    reduction: Reduction = "sequence"
    """How token losses are averaged, see grpo/loss.py. [GRPO] equation 3."""
    ratio: RatioOf = "token"
    """What the clipped ratio is of: each token [GRPO], or the whole caption (GSPO, arXiv
    2507.18071). GSPO's clip range is far smaller: --clip-low 3e-4 --clip-high 4e-4."""
    mask_truncated: bool = False
    """Captions that were cut off at max_new_tokens do not enter the loss; their rewards still count
    in their group's mean (DAPO, section 3.4). Ours: off, [P] has none."""
    inner_epochs: int = 1
    """Optimizer steps on a batch of rollouts. Ours: 1, so the ratio is 1, nothing is clipped."""
    sampler_logprobs: bool = False
    """Use the sampler's log-probabilities as the old ones. Otherwise the trainer computes them at
    the start of the step. In bfloat16 rounding alone would clip 4 of 10 captions of GSPO's."""

    # optimizer
    freeze: Literal["none", "vision", "vision+merger"] = "none"
    """What is not trained. vision: the vision tower. vision+merger: also the layers that map its
    output to the language model. Not found in [P]."""
    lora: Annotated[LoraConfig, tyro.conf.OmitArgPrefixes] = LoraConfig()
    num_steps: int = 1800
    """Steps of the run: about 3 passes over 75k images at 128 a step. [C1]"""
    learning_rate: float = 1e-6
    """Learning rate of AdamW, constant after the warm-up. [C1]"""
    warmup_steps: int = 20
    """Steps of linear warm-up. [C1]"""
    weight_decay: float = 0.0
    """Weight decay of AdamW. Ours: none; at this learning rate it would only pull towards zero."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm. Ours: the usual value."""

    # run
    micro_batch_tokens: int = 16_384
    """Tokens of a micro-batch of the update. Any value gives the same gradient, up to rounding."""
    rollout_tokens: int = 524_288
    """Tokens that the sampler's cache has room for. Any value gives the same captions; in bfloat16
    rounding may change a few."""
    gradient_checkpointing: bool = True
    """Keep only a layer's inputs, and compute the layer again in the backward pass. This takes less
    memory and a third more time. Ours: on; without it a group of the longest captions does not fit
    into 80 GB (docs/scale.md)."""
    seed: int = 0
    """Every random draw is a function of (seed, step, image, use)."""
    check: bool = False
    """Check models, data and machine, print the findings and stop; exit code 2 if one is wrong."""
    held_out: Annotated[HeldOutConfig, tyro.conf.OmitArgPrefixes] = HeldOutConfig()
    tensorboard: bool = False
    """Also write numbers and some images with captions for TensorBoard, to run_dir/tensorboard."""
    tracker: str = ""
    """Also send numbers, settings and some captions to this module, which has `init`, `log` and
    `finish`: wandb or trackio. Ours: none."""

    # checkpoints
    resume: bool = False
    """Go on with the run in run_dir from its latest checkpoint, or from the start without one."""
    save_every: int = 50
    """Steps between two checkpoints; 0 for none but the last. Ours."""
    save_minutes: float = 60.0
    """Minutes after which a checkpoint is saved in any case; 0 for never. SIGTERM, SIGINT and
    SIGHUP save one and stop. Ours."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the newest; each has 12 bytes per trained parameter. Ours."""
    export_every: int = 0
    """Steps between two exports of the policy, a Hugging Face folder; 0 for the last only. Ours."""
    max_skipped: int = 3
    """The run stops after this many consecutive steps with a non-finite gradient or, with
    resample_flat or mask_truncated, without a caption that teaches. Ours."""

    # ranks
    replicas: int = 1
    """Equal groups of ranks that each hold the whole model, sharded (HSDP). Usually the number of
    nodes. Ours: 1, sharded over all ranks."""
    offload_reference: bool = False
    """Keep the reference's shards in the host's memory. Ours: on the GPUs."""
    timeout_minutes: float = 30.0
    """The run stops, naming rank and phase, if ranks wait longer than this for another. Ours."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of exported weights. Ours: as in the released checkpoints. On GPUs the sampler's
    bfloat16 weights are exported."""

    def __post_init__(self):
        asked = self.reward_config
        check_range(self, "prompts_per_step max_new_tokens inner_epochs num_steps rollout_tokens "
                    "micro_batch_tokens verifier_max_new_tokens keep_checkpoints max_skipped "
                    "replicas", at_least=1)
        check_range(self, "group_size probe_images", at_least=2)  # they are compared with others
        check_range(asked, "num_questions", at_least=1)
        check_range(self, "kl_coef learning_rate warmup_steps weight_decay clip_high audit_every "
                    "save_every save_minutes export_every resample_flat", at_least=0)
        check_range(self, "temperature verifier_temperature max_grad_norm", above=0)
        check_range(self, "timeout_minutes", above=0, at_most=525_600)  # a year
        check_range(self, "clip_low max_failed_share", at_least=0, at_most=1)
        if not self.run_dir:
            raise ValueError("run_dir: expected a folder, got an empty text")
        if self.reward == "judge" and (asked.soft or asked.abstain or asked.has_other_parts):
            raise ValueError("reward judge: expected neither soft nor abstain nor weights, its "
                             "rating is the whole reward")
        if asked.soft and self.verifier_mode == "sample":
            raise ValueError("soft: expected verifier_mode logits, a sampled reply has no "
                             "probabilities")
        if self.lora.lora_rank and (self.replicas > 1 or self.offload_reference):
            raise ValueError("lora_rank: expected neither replicas nor offload_reference, every "
                             "rank has the whole base once")

    @property
    def num_captions(self) -> int:
        """B, captions of a step over all ranks."""
        return self.prompts_per_step * self.group_size

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag's name: what config.json holds."""
        settings = {}
        for name, value in asdict(self).items():
            settings |= value if isinstance(value, dict) else {name: value}
        return settings

    def prompts_per_rank(self, num_ranks: int) -> int:
        """Whole groups per rank. Raises ValueError if they do not divide."""
        if self.prompts_per_step % num_ranks:
            raise ValueError(f"prompts_per_step {self.prompts_per_step} does not divide by "
                             f"{num_ranks} ranks")
        if num_ranks % self.replicas:
            raise ValueError(f"replicas {self.replicas}: expected a divisor of the {num_ranks} "
                             "ranks")
        return self.prompts_per_step // num_ranks
