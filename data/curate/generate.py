"""Questions on images, written by a vision-language model."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from data.curate.work import Inputs, count_table, finish, work_through
from data.examples import Example, Question
from data.export import question_row
from data.folders import load_images
from data.images import open_image, picture_hash
from data.ranges import check_range
from data.rows import Dropped, read_question
from data.written import parse_questions
from grpo.distributed import all_or_none, compute_dtype, init_distributed
from grpo.policy import Policy
from grpo.pretrained import load_policy
from grpo.rollout import sample_rollouts

WRITING_INSTRUCTION = """\
Write {num} multiple-choice questions about this image. They are for someone who cannot see it and \
has only read a description of it: whoever read a good description can answer all of them, and \
whoever guesses is right no more often than by chance.

Ask about what can be seen: objects, their number, colors, places and relations, what is written, \
what a chart says, about a different detail each time. Give four options of the same kind, of \
which exactly one is right and none is silly. Do not let a question, or another one, tell the \
answer, and ask nothing that general knowledge can answer.

Keep to this layout:

#### 1. **The question?**
   - A) an option
   - B) an option
   - C) an option
   - D) an option

**Answer:** B) an option
------"""


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `python -m data.curate generate`."""

    images: str
    """A folder, a JSONL or a parquet file."""
    out: str
    """A folder for the questions."""
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    """The vision-language model that writes, a local folder or a hub name; each rank loads it
    whole."""
    num_questions: int = 5
    """Questions that are asked for per image."""
    max_new_tokens: int = 2048
    temperature: float = 1.0
    attempts: int = 3
    """How often an image is tried until a sound question comes."""
    batch_size: int = 16
    """Images at a time."""
    retry_failed: bool = False
    """Try again what failed in an earlier run."""
    seed: int = 0

    def __post_init__(self):
        check_range(self, "num_questions max_new_tokens attempts batch_size", at_least=1)
        check_range(self, "temperature", above=0)


WriteTexts = Callable[[Sequence[Image.Image], Sequence[str]], list[tuple[str, bool]]]
"""(images, the name of each one's random stream) -> for each, the text and whether it was cut
off."""


def generate(config: GenerateConfig, write: WriteTexts | None = None) -> None:
    """Questions on every image, by `write` or the configured model."""
    device, folder = init_distributed(), Path(config.out)
    with all_or_none("start"):
        images = load_images(Path(config.images))
        if write is None:
            model = load_policy(config.model, device, compute_dtype(device))
            write = partial(write_texts, model, config=config)
    settings = asdict(config)
    for key in ("out", "batch_size", "retry_failed"):
        settings.pop(key)
    work = partial(write_batch, write=write, config=config)
    rows = work_through(images, folder, settings, config.retry_failed, config.batch_size, work,
                        {"failed": FORM, "written": FORM})
    sources = dict(images)
    examples = (
        Example(row["id"], sources[row["id"]], tuple(map(read_question, row["questions"])))
        for row in rows if row["questions"]
    )
    fates = Counter(f"{row['fate']}: {row['reason']}".strip(": ") for row in rows)
    lines = count_table("images", fates)
    lines += [f"{sum(len(row['questions']) for row in rows)} questions", ""]
    attempts = [attempt for row in rows for attempt in row["attempts"]]
    dropped = Counter(block["reason"] for attempt in attempts for block in attempt["dropped"])
    lines += count_table("dropped blocks", dropped) if dropped else []
    finish(folder, rows, examples, lines)


FORM = {"reason": str, "questions": [read_question],
        "attempts": [{"text": str, "dropped": [{"reason": str}]}]}
"""What is expected in rows/, see `data.jsonl.fits`."""


def write_batch(batch: Inputs, write: WriteTexts, config: GenerateConfig) -> list[dict]:
    """A row per image: its questions, every attempt, and the picture's hash. An attempt has the
    text as it was written, and what of it was dropped."""
    rows, waiting = {}, {}
    for id, source in batch:
        rows[id] = {"id": id, "fate": "failed", "reason": "no sound question", "questions": [],
                    "attempts": []}
        try:
            waiting[id] = open_image(source)
            rows[id]["picture"] = picture_hash(source)
        except ValueError as error:
            rows[id]["reason"] = str(error)
    for attempt in range(config.attempts):
        keys = [f"{config.seed}:{id}:questions:{attempt}" for id in waiting]
        texts = write(list(waiting.values()), keys) if waiting else []
        for id, (text, truncated) in zip(list(waiting), texts, strict=True):
            blocks = parse_questions(text)
            questions = [block for block in blocks if isinstance(block, Question)]
            dropped = [asdict(block) for block in blocks if isinstance(block, Dropped)]
            rows[id]["attempts"].append({"text": text, "truncated": truncated, "dropped": dropped})
            if questions:
                questions = list(map(question_row, questions))
                rows[id] |= {"fate": "written", "reason": "", "questions": questions}
                del waiting[id]
    return list(rows.values())


def write_texts(model: Policy, images: Sequence[Image.Image], keys: Sequence[str],
                config: GenerateConfig) -> list[tuple[str, bool]]:
    task = WRITING_INSTRUCTION.format(num=config.num_questions)
    prompts = [model.prompt(image, task) for image in images]
    rollouts = sample_rollouts(model, prompts, keys, config.max_new_tokens, config.temperature)
    return list(zip(rollouts.captions, rollouts.truncated.tolist()))
