"""Scores of an answer by each benchmark's own definition, 0 to 1.

Sources: VLMEvalKit and lmms-eval (relaxed accuracy, ANLS), ChartQAPro's and CaptionQA's evaluation
scripts. A prediction is what a model wrote: whatever it is, it gets a score. A gold that cannot be
scored against raises ValueError: data/benchmarks/questions.py refuses such a row when it is read.
Multiple choice has its score where its answer is read, in reward/caprl.py.
"""

import ast
import math
from collections.abc import Sequence
from unicodedata import normalize

TOLERANCE = 0.05
"""Share of the target by which a number may be off."""
ANLS_THRESHOLD = 0.5
"""Less similar answers score 0."""
EXACT_TYPES = {"Fact Checking", "Multi Choice"}
"""ChartQAPro's question types that take no tolerance."""


def exact_match(prediction: str, target: str) -> bool:
    """Equal but for case and the space around, and for how accents are stored (NFC): files and
    tokenizers differ in it. Raises ValueError for an empty target."""
    given, wanted = (normalize("NFC", text) for text in (prediction.strip(), _gold(target)))
    return given.casefold() == wanted.casefold()


def relaxed_accuracy(prediction: str, target: str) -> bool:
    """ChartQA: a number within 5% of the target, relative to the target; anything else by its text,
    case aside.

    A percent sign at the end divides by 100. A target of 0 is compared as text, as published: "0"
    and "0.0" differ. Raises ValueError for an empty target.
    """
    prediction, target = prediction.strip(), _gold(target)
    given, wanted = _fraction(prediction), _fraction(target)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= TOLERANCE
    return prediction.lower() == target.lower()


def anls(prediction: str, golds: Sequence[str]) -> float:
    """DocVQA, InfographicVQA: 1 - edit distance / length of the longer text, for the gold most
    like the prediction; 0 below 0.5.

    The distance ignores case and runs of white space. The lengths are those of the texts as they
    came. Raises ValueError for no golds, or an empty gold.
    """
    if not golds:
        raise ValueError("expected at least one gold answer, found none")
    best = max(
        1 - _edits(_fold(prediction), _fold(_gold(gold))) / max(len(prediction), len(gold))
        for gold in golds
    )
    return best if best >= ANLS_THRESHOLD else 0.0


def chartqapro(prediction: str, answers: Sequence[str], question_type: str,
               year_flags: Sequence[str]) -> float:
    """ChartQAPro: the mean over the items of a list answer ("[2010, 2014]"), in order. A missing or
    extra item scores 0.

    An item has to be equal if its year flag is YES, or if its type is in EXACT_TYPES. Other numbers
    may be 5% off, percent signs dropped. Other texts score their ANLS, here only above 0.5. Full
    stops at the end are dropped. `answers` has an entry for each turn of a conversation, and the
    last is asked for. The published script looks whether the type is in EXACT_TYPES, but does not
    use the result. For its scores, give "" in place of such a type. Raises ValueError for no
    answer, or an empty text.
    """
    if not answers:
        raise ValueError("expected at least one gold answer, found none")
    texts = (_gold(answers[-1]), prediction)
    wanted, given = (_items(text.strip().rstrip(".").rstrip()) for text in texts)
    flags = list(year_flags[-1:] if question_type == "Conversational" else year_flags) or ["NO"]
    if len(flags) < len(wanted):
        flags *= len(wanted)
    scores = []
    for guess, gold, flag in zip(given, wanted, flags):
        is_exact = question_type in EXACT_TYPES or flag.strip().upper() == "YES"
        # Not `exact_match`, which refuses the empty item of "[red, ]".
        is_equal = guess.strip().casefold() == gold.strip().casefold()
        scores.append(float(is_equal) if is_exact else _close(guess, gold))
    return sum(scores) / max(len(wanted), len(given))


def captionqa_abstain_credit(num_choices: int) -> float:
    """What abstaining earns on a question that came with `num_choices` choices: a little more than
    a guess does."""
    return 1 / num_choices + 0.05


def captionqa_offers_abstain(question: str, choices: Sequence[str]) -> bool:
    """Whether CaptionQA offers its abstain option: always but on yes/no questions.

    The published rule knows such a question by how it begins, or by a choice with "yes" in it and
    another with "no". So it also takes "Is it red or blue?" and the choices "blue eyes", "no hat"
    for one. These then have no way to abstain.
    """
    folded = [choice.lower() for choice in choices]
    says_yes = any("yes" in choice for choice in folded)
    says_no = any("no" in choice for choice in folded)
    begins_so = question.strip().lower().startswith(YES_NO_STARTS)
    return not (begins_so or (says_yes and says_no))


YES_NO_STARTS = tuple(
    f"{verb} " for verb in (
        "is", "are", "was", "were", "do", "does", "did", "have", "has", "had", "can", "could",
        "will", "would", "should", "shall", "may", "might", "must",
    )
)


def _gold(text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"expected a gold answer in words, got {text!r}")
    return text.strip()


def _number(text: str) -> float | None:
    """None for what is no number; "nan", "inf" and "1_000", which Python would take for numbers,
    are words."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _fraction(text: str) -> float | None:
    if not text.endswith("%"):
        return _number(text)
    value = _number(text.rstrip("%"))
    return None if value is None else value / 100


def _close(guess: str, gold: str) -> float:
    """Numbers within 5% (of 0: equal), other texts by ANLS. Percent signs around either are
    dropped. An ANLS of 0.5 itself is 0 in ChartQAPro's library, unlike in DocVQA's script."""
    guess, gold = (text.strip().strip("%").strip() for text in (guess, gold))
    given, wanted = _number(guess), _number(gold)
    if given is None or wanted is None:
        similarity = anls(guess, [gold]) if gold else float(guess == gold)
        return similarity if similarity > ANLS_THRESHOLD else 0.0
    return float(abs(given - wanted) <= TOLERANCE * abs(wanted))


def _items(text: str) -> list[str]:
    """["2010", "2014"] of "[2010, 2014]", "['a', 'b']" and "[a, b]"; anything else is one item."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        parsed = [*map(str, ast.literal_eval(text))]  # a number may be too long for `str`
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as it documents
        parsed = text[1:-1].split(",")
    items = [item.strip(" '\"") for item in parsed]
    return items or [text]


def _fold(text: str) -> str:
    return " ".join(text.lower().split())


def _edits(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements from one text to the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
