"""CapRL's own Prism files (`internlm/CapRL-Evaluation-Files`), asked as they are and scored twice.

    load_benchmark("chartqa:CapRL-Evaluation-Files/json_file/lmm_eval_chartqa.json")

A row has `prompt` (the text of a chat for an answerer that sees the image), `answer`, and `image`
(a chat that names its file). The user's text is the question, its options included, so all of them
are answered in words. Beside the score by the benchmark's own definition each has the release's:
an answer that passes any of its tests is right. docs/formats.md says where these facts are from.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from data.benchmarks.files import Row, entry_text, text_list
from data.benchmarks.metrics import anls, relaxed_accuracy
from data.benchmarks.questions import FreeQuestion, Metric, inline_options
from data.choices import LETTERS
from data.labels import letter_place
from data.replies import parse_choice

Rule = Literal["", "char", "info"]
"""Which tests the release makes beside that of equal expressions. It finds "char" or "info" in the
path of the file. Here the kind decides, whose name has the same part."""

IMAGE_MARK = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>")
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ReleasedQuestion(FreeQuestion):
    """A question of the release's files."""

    choices: tuple[str, ...] = ()
    """The options that the question's text has, where the answer is the letter of one."""
    rule: Rule = ""

    def score(self, metric: Metric, prediction: str) -> float:
        """By the benchmark's own definition. A letter counts as it does elsewhere, see
        `parse_choice`; the answer to a question without options has to be equal."""
        if self.choices:
            place = letter_place(self.answers[0], self.choices)
            return float(parse_choice(prediction, self.choices) == place)
        return super().score("exact" if metric == "choice" else metric, prediction)

    def released_score(self, prediction: str) -> float:
        """By the release's script, 0 to 1, see `released_score`."""
        return released_score(prediction, self.answers, self.rule)


def released_question(row: Row, kind: str, metric: Metric) -> ReleasedQuestion:
    """Raises ValueError for a prompt or an answer that cannot be used."""
    turns = TURN.findall(str(row.cell("prompt"))) or [("user", str(row.cell("prompt")))]
    texts = [text for role, text in turns if role == "user"]
    # Where the chat template's own marks stand, an "<image>" is a part of the question.
    mark = IMAGE_MARK if IMAGE_MARK.search("".join(texts)) else "<image>"
    texts = [re.sub(mark, "", text).strip() for text in texts]
    if len(texts) != 1 or not texts[0]:
        raise ValueError(f"prompt: expected one text of a user, found {len(texts)}")
    answers = row.cell("answer")
    if isinstance(answers, str) and answers.lstrip().startswith("[") and kind == "infovqa":
        answers = text_list(answers)
    answers = answers if isinstance(answers, list) else [answers]
    answers = [entry_text(answer).strip() for answer in answers]
    if not (answers and all(answers)):
        raise ValueError(f"expected answers in words, got {answers}")
    choices: tuple[str, ...] = ()
    if metric in ("choice", "exact", "judged") and re.fullmatch(r"\(?[A-J]\)?\.?", answers[0]):
        try:
            choices = tuple(inline_options(texts[0])[1])
        except ValueError:
            choices = tuple(LETTERS) if metric == "choice" else ()
        if choices:
            letter_place(answers[0], choices)
    rule = next((part for part in ("info", "char") if part in kind), "")
    return ReleasedQuestion(texts[0], tuple(answers), choices=choices, rule=rule)


# ------------------------------------------------------------------------- the release's own score


def released_score(prediction: str, answers: tuple[str, ...], rule: Rule) -> float:
    """What the release's script (Prism_Evaluation/Eval_CapRL.py) gives for an answer in its box.

    1 if prediction and gold are the same LaTeX expression to math_verify, as the script calls it:
    equal numbers, and letters in any order ("listen", "silent"), since they are multiplied. With
    "char" and "info" also if they agree by relaxed accuracy. But the 5% are of the prediction, and
    a number may be a hundred times too large or too small. With "info" it is the ANLS, if more. Of
    several answers, also of a list that is written as text, one is enough. A gold that math_verify
    cannot read makes every prediction right.
    """
    from math_verify import verify  # here: it takes a second to load, and few ask for it

    prediction = prediction.strip()
    gold = _expression(answers[0] if len(answers) == 1 else str(list(answers)))
    if not gold:  # right, whatever is said
        return 1.0
    expression = _expression(prediction)
    # The script hands over the prediction first, where math_verify has the gold.
    if any(verify(form, gold) for form in (prediction, expression)):
        return 1.0
    prediction = str(expression[-1]).strip() if expression else ""
    if not rule or not prediction:
        return 0.0
    try:
        texts = [str(scale * float(prediction)) for scale in (1, 0.01, 100)]
    except ValueError:
        texts = [prediction]
    if len(answers) == 1:
        with suppress(ValueError):  # not a list that is written as text
            answers = tuple(filter(str.strip, text_list(answers[0]))) or answers
    # The other way round here too: so the 5% are of the prediction.
    if any(relaxed_accuracy(answer, text) for answer in answers for text in texts):
        return 1.0
    return anls(prediction, answers) if rule == "info" else 0.0


def _expression(text: str) -> list:
    """What math_verify reads in the text: a formula and its text; empty if it reads nothing."""
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", [LatexExtractionConfig()], extraction_mode="first_match")
