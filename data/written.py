"""Questions in the text that a model wrote."""

import re

from data.choices import LETTERS
from data.examples import Question
from data.labels import find_answer
from data.replies import without_thoughts
from data.rows import Dropped

_NUMBER = r"(?:(?:Q(?:uestion)?|问题|問題)[ \t]*)?\d+[.):\uff0e\uff1a\u3001]"
_HEADER = re.compile(rf"^[ \t]*(?:#{{1,6}}[ \t]+|\**{_NUMBER}(?=[\s*]|[^\x00-\x7f]))", re.I)
_REMARK = re.compile(r"[\s*_]*(?:(?:explanation|reason(?:ing)?|note)\b|解析|分析|[解注][释釋]|"
                     r"[说說]明|理由)[\s*_]*[:\uff1a]", re.IGNORECASE)
_RULE = re.compile(r"^\s*[-_*=—]{3,}\s*$")
_OPTION = re.compile(r"^[\s\-*•]*[(\uff08]?([A-J])\**[)\uff09.:\u3001\uff0e\uff1a]\**\s*(.*?)\s*$")
_ANSWER = re.compile(
    r"^[\s\-*#>]*(?:the\s+)?(?:correct\s+|正[确確])?(?:answer|答案)\**\s*(?:is|[是为為])?\s*"
    r"[:\uff1a]\**\s*(.*?)\s*$",
    re.IGNORECASE,
)


def parse_questions(text: str) -> list[Question | Dropped]:
    """The questions in a model's text; a `Dropped` in the place of each block that is none.

    A block, as data.curate asks for it:

        #### 1. **How many bars are there?**
           - A) two
           - B) three
        **Answer:** B) three
        ------

    Letter and text of the answer must agree where both are given. What is neither question, option
    nor answer is passed over, and so are the model's thoughts before it writes them.
    """
    questions: list[Question | Dropped] = []
    for block in _blocks(without_thoughts(text)):
        try:
            questions.append(_parse_block(block))
        except ValueError as error:
            questions.append(Dropped(str(error), "\n".join(block).strip()))
    return questions


def _blocks(text: str) -> list[list[str]]:
    """Lines of each block. What stands before the first header or after a rule counts only if it
    has options or an answer."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if _RULE.match(line):
            blocks.append([])
        elif _HEADER.match(line):
            blocks.append([line])
        else:
            blocks[-1].append(line)
    return [block for block in blocks if any(map(_is_part, block))]


def _is_part(line: str) -> bool:
    return any(pattern.match(line) for pattern in (_HEADER, _OPTION, _ANSWER))


def _parse_block(block: list[str]) -> Question:
    """Raises ValueError with one of a few phrases, to be counted by."""
    words, options, answers, is_open = [], [], [], False
    for line in [_HEADER.sub("", block[0]), *block[1:]]:
        answer, option = _ANSWER.match(line), _OPTION.match(line)
        if answer:
            answers.append(answer[1])
        elif answers:
            continue  # an explanation
        elif option and words:
            options.append((option[1], option[2].strip("*")))
            is_open = True
        elif options:
            # After an empty line, or from "Explanation:" on, it is a remark.
            is_open &= bool(line.strip()) and not _REMARK.match(line)
            if is_open:
                options[-1] = (options[-1][0], f"{options[-1][1]} {line.strip()}")
        elif line.strip():
            words.append(re.sub(rf"^{_NUMBER}\s*", "", line.strip(" \t#*")).strip(" *"))
    question = " ".join(words).strip()
    if not question:
        raise ValueError("no question")
    if len(options) < 2:
        raise ValueError("fewer than two options")
    if "".join(letter for letter, _ in options) != LETTERS[: len(options)]:
        raise ValueError("options not lettered A, B, C, ... in order")
    if len(answers) != 1 or not answers[0].strip(" *_"):
        raise ValueError("no answer" if len(answers) < 2 else "more than one answer")
    choices = tuple(text for _, text in options)
    try:
        Question(question, choices, 0)
    except ValueError:
        raise ValueError("options empty or alike") from None
    try:
        return Question(question, choices, find_answer(answers[0], choices))
    except ValueError:
        raise ValueError("answer is none of the options, or its letter and text disagree") from None
