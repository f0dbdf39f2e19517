"""Held-out accuracy while a run trains: evaluate.py's Prism evaluation of the policy as it is.

An evaluation captions the same images from the same random streams each time. The verifier answers
the same questions under the same shuffles, by the likeliest letter. All ranks share the work, and
no draw of training changes. Each evaluation is a line of RUN/eval.jsonl, whose `step` counts the
steps before it: 0 is the initial policy. The last line is what this prints of RUN/final:

    python evaluate.py prism --policy runs/toy/final --verifier data/toy/verifier \\
        --data EVAL_DATA --max-new-tokens 96

with the run's seed and temperature, --limit for --eval-images and --num-captions for
--eval-samples (for 0, --temperature 0). A share, such as --eval-data 0.02, is 0.02:DATA there. Two
things may change it: weights are rounded if --save-dtype is not the sampler's, and adapters are
merged.

The policy of the best line is in RUN/best, with the line as its step.json. All that is known of
the best and of --patience is read from eval.jsonl. A checkpoint is saved before the best policy is
exported. So a run that is killed and resumed never meets a best policy of steps that it has yet to
take.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType

from tqdm import tqdm

from data.benchmarks.benchmark import (
    Benchmark,
    example_benchmark,
    held_out,
    is_share,
    load_benchmark,
)
from data.examples import Example
from data.io import json_lines, naming, short, to_json
from data.jsonl import fits, read_log
from data.pictures import picture_keys
from grpo.checkpoint import latest_checkpoint, save_checkpoint, training_state
from grpo.config import TrainConfig
from grpo.distributed import Phases, all_or_none, gather_rows, print0, rank
from grpo.log import EVAL_LOG, finite_numbers
from grpo.run import Run, export
from grpo.run_dir import best_line, check_writer
from reward.caprl import Verifier
from tools.caption_cache import CaptionsConfig, write_captions
from tools.prism import prism, word_answerer
from tools.reply_judge import reply_judge
from tools.stats import summarize

ANSWER_TOKENS = 32
"""Longest answer in words, in tokens: evaluate.py's default."""

KEYS = ("accuracy", "low", "high", "images", "questions", "failed", "unparsed", "cut", "words",
        "tokens")
"""Of `tools.stats.summarize`: what a line of eval.jsonl has beside its step."""


def set_aside(examples: Sequence[Example],
              config: TrainConfig) -> tuple[list[Example], "HeldOut"]:
    """The examples that are left to train on, and the evaluation on what `eval_data` names. No
    picture is in both. Raises ValueError for data that cannot be read, or leave nothing."""
    source = config.held_out.eval_data
    if is_share(source):
        chosen = held_out(examples, source)
        benchmark = example_benchmark(f"{source}:{config.data}", chosen)
        aside = {example.id for example in chosen}
    else:
        benchmark = load_benchmark(source)
        images = [example.image for example in examples]
        keys = picture_keys(images + [picture.image for picture in benchmark.pictures])
        shown = set(keys[len(images) :])
        aside = {example.id for example, key in zip(examples, keys) if key in shown}
    kept = [example for example in examples if example.id not in aside]
    print0(f"{len(benchmark.pictures)} images of {benchmark.name} are held out; {len(aside)} of "
           f"them are in {config.data} and not trained on")
    if benchmark.refused:
        print0(f"{len(benchmark.refused)} rows or questions of {source} are refused, the first: "
               f"{benchmark.refused[0]}")
    del benchmark.pictures[config.held_out.eval_images or len(benchmark.pictures) :]
    return kept, HeldOut(benchmark, config)


def standing(rows: Sequence[dict], patience: int, stop_at: float) -> tuple[dict | None, str]:
    """The best line of eval.jsonl, the first of equals, and why the run ends after the last one;
    empty if it goes on. What could not be measured is no evaluation."""
    rows = [row for row in rows if row["accuracy"] is not None]
    if not rows:
        return None, ""
    best = max(rows, key=lambda row: row["accuracy"])
    num_worse = len(rows) - 1 - rows.index(best)
    text = f"held-out accuracy {best['accuracy']:.3f} after {best['step']} steps"
    if stop_at and rows[-1]["accuracy"] >= stop_at:
        return best, f"held-out accuracy {rows[-1]['accuracy']:.3f} has reached stop_at {stop_at}"
    if patience and num_worse >= patience:
        return best, f"{text} has not been surpassed in {num_worse} evaluations (patience)"
    return best, ""


def read_evaluations(run_dir: Path) -> list[dict]:
    """The lines of eval.jsonl. Raises ValueError for one that is none, and if that of best/ is
    missing: a worse policy would take its place."""
    path, rows = run_dir / EVAL_LOG, read_log(run_dir / EVAL_LOG)
    form = {"step": int, "accuracy": (int, float, NoneType)}
    for number, row in enumerate(rows, start=1):
        if "accuracy" not in row or not fits(row, form):
            raise ValueError(f"{path} row {number}: expected a step and an accuracy, found "
                             f"{short(row)}")
    kept = best_line(run_dir)
    if kept and kept not in rows:
        raise ValueError(f"{path}: expected the line of best/step.json, found none: move best/ "
                         "away, or put the line back, if the checkpoint is not from before it")
    return rows


class HeldOut:
    """Measures the policy between the steps of a run. Every rank must call all methods."""

    def __init__(self, benchmark: Benchmark, config: TrainConfig):
        self.benchmark, self.config, self.settings = benchmark, config, config.held_out
        self.captioning = CaptionsConfig(
            temperature=config.temperature if self.settings.eval_samples else 0.0, cache="",
            max_new_tokens=config.max_new_tokens, rollout_tokens=config.rollout_tokens,
            num_captions=self.settings.eval_samples or 1,
        )

    def contents(self) -> dict[str, str]:
        """As `run_contents`."""
        return {"eval_data": self.benchmark.contents}

    def watch(self, steps: Iterable[int], first_step: int, run_dir: Path, run: Run,
              verifier: Verifier, phases: Phases, trackers: list) -> Iterator[int]:
        """The steps, with an evaluation before each that has one and after the last. They end
        early when it is enough."""
        self.run_dir, self.run, self.path = run_dir, run, run_dir / EVAL_LOG
        self.verifier = verifier.under(mode="logits")
        self.phases, self.trackers = phases, trackers
        with all_or_none("held-out"):
            rows = read_evaluations(run_dir) if rank() == 0 else []
        self.rows = gather_rows(rows)
        num_steps = first_step
        for step in steps:
            if self._evaluate(step):
                return
            yield step
            num_steps = step + 1
        self._evaluate(num_steps)

    def _evaluate(self, num_steps: int) -> str:
        """Evaluates after so many steps, if that is due. Returns why the run ends here, or ""."""
        is_due = num_steps % self.settings.eval_every == 0 or num_steps >= self.config.num_steps
        is_known = any(row["step"] == num_steps for row in self.rows)
        if not (is_due or is_known):
            return ""
        with self.phases("held_out"):
            if not is_known:
                self.rows.append(self._measure(num_steps))
            best, reason = standing(self.rows, self.settings.patience, self.settings.stop_at)
            self._keep(best, self.rows[-1], bool(reason))
        with all_or_none("log"), naming(self.run_dir):
            for tracker in self.trackers:
                tracker(num_steps, finite_numbers(eval=self.rows[-1]), [])
        if reason:
            print0(f"the run ends after {num_steps} steps: {reason}; --resume goes on if "
                   "--patience or --stop-at say so")
        return reason

    def _measure(self, num_steps: int) -> dict:
        """The new line of eval.jsonl."""
        captions = write_captions(self.run.sampler, self.benchmark.pictures, self.captioning,
                                  self.config.seed)
        write = word_answerer(self.verifier, ANSWER_TOKENS)
        answered = prism(self.benchmark, captions, self.verifier, self.config.seed, write,
                         reply_judge(self.verifier))
        with all_or_none("held-out"), naming(self.path):
            rows = []
            if rank() == 0:
                table = summarize(answered)["all"]
                row = {"step": num_steps} | {key: table[key] for key in KEYS}
                rows.append(json.loads(to_json(row)))  # as a resumed run reads it
                check_writer(self.run_dir)
                with self.path.open("ab") as file:
                    file.writelines(json_lines(rows))
                tqdm.write(f"    held-out  step {num_steps}  accuracy {table['accuracy']:.3f} "
                           f"({table['low']:.3f} to {table['high']:.3f})  {table['words']:.1f} "
                           f"words  {table['cut']:.3f} cut  {table['failed']} failed")
        return gather_rows(rows)[0]

    def _keep(self, best: dict | None, last: dict, is_end: bool) -> None:
        """Exports the policy if its evaluation is the best, unless it is exported. A checkpoint is
        saved before; of the initial policy only if the run ends with it."""
        folder, states = self.run_dir / "best", []
        with all_or_none("best"):
            if rank() == 0:
                checkpoint = latest_checkpoint(self.run_dir)
                states.append((best_line(self.run_dir), checkpoint[1] if checkpoint else -1))
        kept, num_saved = gather_rows(states)[0]
        is_new = best == last and kept != last
        if ((is_new and last["step"]) or is_end) and last["step"] > num_saved:
            state = training_state(self.run.scorer, self.run.optimizer)
            save_checkpoint(self.run_dir, last["step"], state, self.config.keep_checkpoints)
        if is_new:
            export(self.run, folder, self.config, last)
