# ruff: noqa: RUF001 - Chinese text has its own punctuation
"""Questions in the text that a model wrote."""

from data.examples import Question
from data.rows import Dropped
from data.written import parse_questions


def test_a_models_text_is_read_block_by_block_and_what_is_dropped_is_named():
    text = """Sure! Here are some questions.

#### 1. **How many
cats are there?**
   - A) one
   - B) two cats
     in a basket
   - C) 3. three
**Answer:** B) two cats in a basket
Because there are two.
------
**2. 颜色？**
A) 红
B）蓝
答案：B
---
### Question 3: Which?
- **A)** x
- **B)** y
- Correct answer: **A**
1. no options here
**Answer:** A
#### 5. **Two answers?**
 - A) x
 - B) y
**Answer:** A
**Answer:** B
#### 6. **Alike?**
 - A) x
 - B)  x
**Answer:** A
#### 7. **Out of order?**
 - A) x
 - C) y
**Answer:** A
#### 8. **Which disagrees?**
 - A) x
 - B) y
**Answer:** A) y
#### 9.
 - A) x
 - B) y
**Answer:** A
#### 10. **Cut off?**
 - A) x
 - B) y"""
    found = parse_questions(text)
    questions, dropped = ([one for one in found if isinstance(one, kind)] for kind in (Question, Dropped))
    assert [isinstance(one, Question) for one in found] == 3 * [True] + 7 * [False]
    assert [(q.question, q.choices, q.answer_index) for q in questions] == [
        ("How many cats are there?", ("one", "two cats in a basket", "3. three"), 1), ("颜色？", ("红", "蓝"), 1),
        ("Which?", ("x", "y"), 0),
    ]
    assert [one.reason for one in dropped] == [
        "fewer than two options", "more than one answer", "options empty or alike",
        "options not lettered A, B, C, ... in order", "answer is none of the options, or its letter and text disagree",
        "no question", "no answer",
    ]
    assert parse_questions("") == parse_questions("I see no picture.\n---\nSorry.") == []
