"""A whole GRPO step, ours and TRL's, on the same models, images, lengths and questions: seconds and
memory by phase.

    pip install -r bench/requirements.txt        # TRL, in an environment of its own if you like
    python bench/step.py                          # vocabulary 4,096, images of 224 and 448 pixels
    python bench/step.py --hidden 512 --layers 8
    python bench/step.py --vocab 151936 --repeats 3
    python bench/step.py --sizes 896 --prompts 1
    python bench/step.py --scale    # ours alone: cost against caption length, G and image size

Each engine is a process of its own. They take turns, step by step, so that other work on the
machine meets both. One thread each, and the process's own CPU clock. Weights are random, and no
completion ends early. Every caption that the verifier reads has the same length. "trl" scores
completions only, as on CUDA. "trl-cpu" scores every position, its default on a CPU; that flatters
us. The whole step is measured from the turn to its end. What no phase holds is "other": templates,
tokenizing, decoding, advantages, metrics.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from PIL import Image
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from data.examples import Example, Question
from data.toy.captioner import qwen_config
from data.toy.tokenizer import build_tokenizer
from grpo.config import RewardConfig
from grpo.logprobs import CompletionScorer
from grpo.policy import CAPTION_INSTRUCTION
from grpo.pretrained import load_policy
from grpo.recipes import toy_config
from grpo.rollout import sample_rollouts
from grpo.update import update_policy
from reward.caprl import PromptWriter, ask, caption_rewards, load_verifier
from tools.memory import status


@dataclass(frozen=True)
class StepConfig:
    """Sizes of the measurement."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 4
    verifier_hidden: int = 256
    verifier_layers: int = 4
    sizes: tuple[int, ...] = (224, 448)
    """Sides of the square images, in turn."""
    prompts: int = 2
    group_size: int = 8
    tokens: int = 128
    questions: int = 4
    engines: tuple[str, ...] = ("ours", "trl", "trl-cpu")
    repeats: int = 5
    scale: bool = False
    worker: str = ""
    """Set by the bench itself."""
    folder: str = ""


class Phases:
    """Seconds and growth of the process's memory in bytes, by phase, of one step.

    Memory counts in the first step only, which is a warm-up. There the heap is handed back to the
    system before each phase. That would cost time in the others.
    """

    def __init__(self, is_first: bool = True):
        self.is_first, self.seconds, self.memory = is_first, defaultdict(float), defaultdict(float)
        # of each phase under way: memory at its start, highest so far
        self.open: list[list[float]] = []
        self.started = time.process_time()

    @contextmanager
    def __call__(self, name: str):
        for outer in self.open:
            outer[1] = max(outer[1], status("VmHWM"))
        if self.is_first:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM again
        self.open.append([status("VmRSS"), 0.0])
        started = time.process_time()
        yield
        self.seconds[name] += time.process_time() - started
        before, highest = self.open.pop()
        self.memory[name] = max(self.memory[name], highest - before, status("VmHWM") - before)

    def report(self) -> None:
        self.seconds["whole step"] = time.process_time() - self.started
        print("step " + json.dumps({"seconds": self.seconds, "memory": self.memory}), flush=True)
        self.__init__(is_first=False)


def _wait_for_turn() -> None:
    if not sys.stdin.readline():
        sys.exit()


# ------------------------------------------------------------------------------------ the same work


def save_models(config: StepConfig, folder: Path) -> None:
    tokenizer = build_tokenizer()
    common = dict(vocab_size=config.vocab, max_position_embeddings=32768)
    torch.manual_seed(0)
    policy = Qwen2_5_VLForConditionalGeneration(qwen_config(
        tokenizer,
        text=common | dict(hidden_size=config.hidden, intermediate_size=2 * config.hidden,
                           num_hidden_layers=config.layers, num_attention_heads=4,
                           num_key_value_heads=2),
        vision=dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4,
                    fullatt_block_indexes=[1, 3]),
    ))
    verifier = Qwen2ForCausalLM(Qwen2Config(
        **common, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        hidden_size=config.verifier_hidden, intermediate_size=2 * config.verifier_hidden,
        num_hidden_layers=config.verifier_layers,
        num_attention_heads=config.verifier_hidden // 64,
        num_key_value_heads=max(1, config.verifier_hidden // 128),
    ))
    for name, model in (("policy", policy), ("verifier", verifier)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    Qwen2VLImageProcessorPil().save_pretrained(folder / "policy")


def make_images(config: StepConfig) -> list[Image.Image]:
    """Smooth noise."""
    generator, images = torch.Generator().manual_seed(0), []
    for index in range(config.prompts):
        small = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        side = config.sizes[index % len(config.sizes)]
        images.append(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC))
    return images


def make_examples(config: StepConfig) -> list[Example]:
    questions = tuple(
        Question(f"What color is the {name}?", ("red", "blue", "green", "pink"), 0)
        for name in ("circle", "square", "star", "cross", "triangle", "diamond", "first bar",
                     "card")[: config.questions]
    )
    return [Example(str(index), image, questions)
            for index, image in enumerate(make_images(config))]


def make_caption(config: StepConfig) -> str:
    """What the verifier reads, whatever was sampled: one token for each sampled one."""
    return ("The first bar is red." + " red" * config.tokens)[: len("The first bar is red.") + 4
                                                              * (config.tokens - 6)]


# -------------------------------------------------------------------------------------- the engines


def run_ours(config: StepConfig) -> None:
    device, folder, phases = torch.device("cpu"), Path(config.folder), Phases()
    policy = load_policy(str(folder / "policy"), device)
    # Of a vocabulary that is larger than the tokenizer's, nearly all ids have no token. A real
    # checkpoint has a few hundred of them. So here policy and verifier may write them.
    named = {i for i in policy.forbidden_ids if i < len(policy.tokenizer)}
    policy = replace(policy, forbidden_ids=tuple(sorted({*named, *policy.eos_ids})))
    scorer = CompletionScorer(policy.model, policy.forbidden_ids)
    model = load_policy(str(folder / "policy"), device).model.requires_grad_(False)
    frozen = CompletionScorer(model, policy.forbidden_ids)
    verifier = load_verifier(str(folder / "verifier"), device, mode="sample")
    verifier.forbidden_ids = policy.forbidden_ids
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-6)
    step_weights = optimizer.step

    def timed_step():
        with phases("optimizer"):
            step_weights()

    optimizer.step = timed_step
    settings = toy_config(group_size=config.group_size, max_new_tokens=config.tokens,
                          prompts_per_step=config.prompts,
                          micro_batch_tokens=1 << 20, kl_coef=0.04, learning_rate=1e-6)
    examples = make_examples(config)
    by_caption = [example for example in examples for _ in range(config.group_size)]
    captions = [make_caption(config)] * len(by_caption)
    advantages, valid = torch.randn(len(by_caption)), torch.ones(len(by_caption), dtype=torch.bool)

    def reference(part, **how):
        with phases("reference pass"):
            return frozen(part, **how)

    while True:
        _wait_for_turn()
        phases.started = time.process_time()
        with phases("image preprocessing"):
            prompts = [policy.prompt(example.image) for example in examples]
        with phases("rollout"):
            rollouts = sample_rollouts(policy, prompts, [str(i) for i in range(len(by_caption))],
                                       config.tokens)
        assert (rollouts.lengths == config.tokens).all()
        with phases("verifier"):
            asking = RewardConfig(num_questions=config.questions)
            caption_rewards(captions, by_caption, [e.id for e in by_caption], [0] * len(captions),
                            verifier, asking)
        with phases("forward + backward"):
            update_policy(scorer, reference, optimizer, rollouts, advantages, valid, settings)
        inside = phases.seconds["reference pass"] + phases.seconds["optimizer"]
        phases.seconds["forward + backward"] -= inside
        phases.report()


def run_trl(config: StepConfig, scores_completions_only: bool) -> None:
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import Qwen2_5_VLProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    if scores_completions_only:
        trl.trainer.utils._use_triton = lambda device: True  # all that this decides on a CPU
    phases, folder = Phases(), Path(config.folder)

    class ImageProcessorOnly(Qwen2_5_VLProcessor):
        """Without the video half, which wants torchvision."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer,
                                                      chat_template=chat_template)
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids,
                                                           ("<|image_pad|>", "<|video_pad|>"))

    class TimedTrainer(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            with phases("rollout"):
                return super()._generate_single_turn(*args, **kwargs)

        def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
            if torch.is_grad_enabled():
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            with phases("reference pass"):
                return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

        def _calculate_rewards(self, *args, **kwargs):
            with phases("verifier"):
                return super()._calculate_rewards(*args, **kwargs)

        def training_step(self, model, inputs, *args, **kwargs):
            inputs = self._prepare_inputs(inputs)
            # done: what is left is the pass itself
            self._prepare_inputs = lambda prepared: prepared
            try:
                with phases("forward + backward"):
                    return super().training_step(model, inputs, *args, **kwargs)
            finally:
                del self._prepare_inputs

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            _wait_for_turn()
            phases.started = time.process_time()

        def on_pre_optimizer_step(self, *args, **kwargs):
            self.started = time.process_time()

        def on_optimizer_step(self, *args, **kwargs):
            phases.seconds["optimizer"] = time.process_time() - self.started

        def on_step_end(self, *args, **kwargs):
            phases.report()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "policy", padding_side="left")
    processor = ImageProcessorOnly(Qwen2VLImageProcessorPil(), tokenizer,
                                   chat_template=tokenizer.chat_template)
    process_images = processor._process_images

    def timed_process_images(*args, **kwargs):
        with phases("image preprocessing"):
            return process_images(*args, **kwargs)

    processor._process_images = timed_process_images
    verifier = Qwen2ForCausalLM.from_pretrained(folder / "verifier").eval()
    writer, examples = PromptWriter(tokenizer), make_examples(config)
    asked = [ask(example.questions, RewardConfig(num_questions=config.questions), example.id)
             for example in examples]
    caption = make_caption(config)

    @torch.no_grad()
    def reward(completions, index, **_):
        """The obvious way: every caption and question is a prompt of its own for `generate`."""
        texts = [
            tokenizer.decode(writer.head_ids + writer.caption_ids(caption)
                             + writer.question_ids(question))
            for place in index for question in asked[place]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        verifier.generate(
            **batch, do_sample=True, temperature=0.6, top_k=0, top_p=1.0, max_new_tokens=10,
            suppress_tokens=tokenizer.all_special_ids,
        )
        return torch.randn(len(index)).tolist()

    rows = [
        {"prompt": [{"role": "user", "content": CAPTION_INSTRUCTION}], "image": example.image,
         "index": place}
        for place, example in enumerate(examples)
    ] * (config.repeats + 1)
    batch = config.prompts * config.group_size
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, num_generations=config.group_size,
        temperature=1.0,
        max_completion_length=config.tokens, beta=0.04, per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        generation_kwargs={"suppress_tokens": tokenizer.all_special_ids},
        max_steps=config.repeats + 1, shuffle_dataset=False, remove_unused_columns=False,
        dataloader_pin_memory=False,
        optim="adamw_torch", save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True,
    )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "policy",
                                                               dtype=torch.float32)
    TimedTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=processor, callbacks=[Turns()],
    ).train()


# ---------------------------------------------------------------------------------------- the bench


def measure(config: StepConfig, folder: Path) -> dict[str, list[dict]]:
    """Steps of each engine, in turns; the first of each is a warm-up."""
    save_models(config, folder)
    workers = {}
    for engine in config.engines:
        flags = [str(part)
                 for name, value in vars(replace(config, worker=engine, folder=str(folder),
                                                 scale=False)).items()
                 if name != "scale" and value != ()
                 for part in (f"--{name.replace('_', '-')}",
                              *(value if isinstance(value, tuple) else [value]))]
        log = (folder / f"{engine}.log").open("w")
        workers[engine] = subprocess.Popen(
            [sys.executable, __file__, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True
        )
    steps: dict[str, list[dict]] = {engine: [] for engine in workers}
    for _ in tqdm(range(config.repeats + 1), desc="steps", leave=False):
        for engine, worker in workers.items():
            with suppress(BrokenPipeError):  # it has ended: its log says why
                worker.stdin.write("go\n")
                worker.stdin.flush()
            line = ""
            while not line.startswith("step "):
                if not (line := worker.stdout.readline()):
                    log = (folder / f"{engine}.log").read_text()
                    raise RuntimeError(f"{engine} ended early:\n{log[-3000:]}")
            steps[engine].append(json.loads(line.removeprefix("step ")))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait(timeout=60)
    return steps


PHASES = ("image preprocessing", "rollout", "verifier", "reference pass", "forward + backward",
          "optimizer")


def medians(rows: list[dict]) -> dict[str, float]:
    seconds = {phase: statistics.median(row["seconds"].get(phase, 0.0) for row in rows[1:])
               for phase in (*PHASES, "whole step")}
    other = seconds["whole step"] - sum(seconds[phase] for phase in PHASES)
    return seconds | {"of which other": other}


def print_table(config: StepConfig, steps: dict[str, list[dict]]) -> None:
    ours = medians(steps["ours"])
    others = {engine: medians(rows) for engine, rows in steps.items() if engine != "ours"}
    tokens = config.prompts * config.group_size * config.tokens
    print(
        f"\nvocabulary {config.vocab}, hidden {config.hidden}, {config.layers} layers, images "
        f"{config.sizes}, {config.prompts} prompts x {config.group_size} x {config.tokens} tokens, "
        f"{config.questions} questions; CPU seconds, median of {config.repeats}\n"
    )
    print("| phase | ours |" + "".join(f" {engine} | ratio |" for engine in others))
    print("| --- | ---: |" + " ---: | ---: |" * len(others))
    for phase, seconds in ours.items():
        ratio = "{:.2f}" if phase != "of which other" else ""
        cells = [f" {other[phase]:.3f} | {ratio.format(other[phase] / seconds)} |"
                 for other in others.values()]
        print(f"| {phase} | {seconds:.3f} |" + "".join(cells))
    memory = {engine: rows[0]["memory"]["forward + backward"] / 2**20
              for engine, rows in steps.items()}
    print(f"| memory of forward + backward, MiB | {memory['ours']:.0f} |"
          + "".join(f" {memory[engine]:.0f} | {memory['ours'] / memory[engine]:.2f} |"
                    for engine in others))
    rates = {engine: tokens / seconds["whole step"]
             for engine, seconds in {"ours": ours, **others}.items()}
    print(f"| tokens per second | {rates['ours']:.0f} |"
          + "".join(f" {rates[engine]:.0f} | |" for engine in others))


def print_scale(config: StepConfig) -> None:
    columns = [*PHASES, "whole step", "of which other"]
    print("| varied | value | " + " | ".join(columns) + " |\n| --- | ---: |" + " ---: |"
          * len(columns))
    varied = {"tokens": (64, 128, 256, 512), "group_size": (4, 8, 16, 32),
              "sizes": ((224,), (448,), (896,))}
    for name, values in varied.items():
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                settings = replace(config, engines=("ours",), prompts=1,
                                   **{"sizes": (448,), name: value})
                seconds = medians(measure(settings, Path(folder))["ours"])
            shown = value[0] if isinstance(value, tuple) else value
            print(f"| {name} | {shown} | "
                  + " | ".join(f"{value:.3f}" for value in seconds.values()) + " |", flush=True)


def main(config: StepConfig) -> None:
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    if config.worker:
        if config.worker == "ours":
            run_ours(config)
        else:
            run_trl(config, scores_completions_only=config.worker == "trl")
    elif config.scale:
        print_scale(config)
    else:
        with tempfile.TemporaryDirectory() as folder:
            print_table(config, measure(config, Path(folder)))


if __name__ == "__main__":
    main(tyro.cli(StepConfig))
