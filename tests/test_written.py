# ruff: noqa: RUF001 - Chinese text has its own punctuation
"""Questions in the text that a model wrote."""

import pytest

from data.examples import Question
from data.rows import Dropped
from data.written import parse_questions

SOUND = {
    "lines go on, and an explanation follows": (
        """\
#### 1. **How many
cats are there?**
   - A) one
   - B) two cats
     in a basket
   - C) 3. three
**Answer:** B) two cats in a basket
Because there are two.
------
""",
        Question("How many cats are there?", ("one", "two cats in a basket", "3. three"), 1),
    ),
    "Chinese": (
        """\
**2. 颜色？**
A) 红
B）蓝
答案：B
---
""",
        Question("颜色？", ("红", "蓝"), 1),
    ),
    "a Chinese remark before the answer": (
        """\
1、颜色？
A、红
B、蓝
解析：图中是红色。
答案：A
""",
        Question("颜色？", ("红", "蓝"), 0),
    ),
    "a remark before the answer": (
        """\
#### 4. **Which?**
 - A) x
 - B) y

**Explanation:** the sign
says x.

**Answer:** A) x
""",
        Question("Which?", ("x", "y"), 0),
    ),
    "a remark on the next line": (
        """\
#### 5. **Which?**
 - A) x
 - B) y
of glass
**Explanation**: the sign says x.
**Answer:** A) x
""",
        Question("Which?", ("x", "y of glass"), 0),
    ),
    "bold letters": (
        """\
### Question 3: Which?
- **A)** x
- **B)** y
- Correct answer: **A**
""",
        Question("Which?", ("x", "y"), 0),
    ),
}
"""What is special about a block -> its text and the question in it."""
DROPPED = {
    "fewer than two options": """\
1. no options here
**Answer:** A
""",
    "more than one answer": """\
#### 5. **Two answers?**
 - A) x
 - B) y
**Answer:** A
**Answer:** B
""",
    "options empty or alike": """\
#### 6. **Alike?**
 - A) x
 - B)  x
**Answer:** A
""",
    "options not lettered A, B, C, ... in order": """\
#### 7. **Out of order?**
 - A) x
 - C) y
**Answer:** A
""",
    "answer is none of the options, or its letter and text disagree": """\
#### 8. **Which disagrees?**
 - A) x
 - B) y
**Answer:** A) y
""",
    "no question": """\
#### 9.
 - A) x
 - B) y
**Answer:** A
""",
    "no answer": """\
#### 10. **Cut off?**
 - A) x
 - B) y""",
}
"""The reason for which a block is dropped -> its text."""


@pytest.mark.parametrize("text, question", SOUND.values(), ids=SOUND)
def test_a_sound_block_is_a_question(text, question):
    assert parse_questions(text) == [question]


@pytest.mark.parametrize("reason", DROPPED)
def test_what_is_wrong_with_a_block_is_named_and_its_text_is_kept(reason):
    assert parse_questions(DROPPED[reason]) == [Dropped(reason, DROPPED[reason].strip())]


def test_a_text_is_read_block_by_block():
    """With or without a rule between two blocks. A bad block costs no other one."""
    text = "Sure! Here are some questions.\n\n" + "".join([*(text for text, _ in SOUND.values()), *DROPPED.values()])
    dropped = [Dropped(reason, block.strip()) for reason, block in DROPPED.items()]
    assert parse_questions(text) == [*(question for _, question in SOUND.values()), *dropped]


def test_a_rule_alone_parts_two_blocks():
    block = "Which?\nA) x\nB) y\nAnswer: A\n"
    assert parse_questions(f"{block}---\n{block}") == 2 * [Question("Which?", ("x", "y"), 0)]


def test_chinese_forms_of_questions_are_read():
    """A remark was a part of the last option, and of several questions without spaces none was read."""
    text = "1.颜色？\nA.红\nB.蓝\n解析：因为\n正确答案：A\n{}\nA、一\nB、二\n说明: 略\n答案是：B\n"
    two = [Question("颜色？", ("红", "蓝"), 0), Question("几只？", ("一", "二"), 1)]
    for header in ("2.几只？", "2、几只？", "问题2：几只？", "---\n几只？"):
        assert parse_questions(text.format(header)) == two, header


def test_drafts_among_the_thoughts_are_no_questions():
    text, question = SOUND["bold letters"]
    for thoughts in (f"<think>\nFirst a draft:\n{text}</think>\n", f"{text}No.\n</think>\n"):
        assert parse_questions(thoughts + text) == [question]
    assert parse_questions(f"<think>\n{text}") == []  # cut off in its thoughts


def test_a_text_without_blocks_has_no_questions():
    assert parse_questions("") == parse_questions("I see no picture.\n---\nSorry.") == []
