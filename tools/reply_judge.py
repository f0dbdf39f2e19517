"""Answers in words that a model compares with the right one, as CharXiv, MathVerse and MathVision
define their scores. A reply that is equal to the right answer is right without being asked about.

Their judges are OpenAI's. Ours is the verifier, with a prompt of our own.
"""

from collections.abc import Sequence

from data.benchmarks.benchmark import Picture
from reward.caprl import (
    CAPTION_AND_QUESTION,
    CAPTION_END,
    CAPTION_START,
    Asked,
    AskVerifier,
    Verifier,
)
from tools.stats import mean

SAME = "Does the reply say the same as the right answer?"

JUDGE_PROMPT = f"""\
Compare the reply to a question with the right answer. They say the same if they mean the same: \
another form of a number, a missing unit or more words do not matter, another value does. Reply \
with the letter of one option.

Caption: {CAPTION_START} Right answer: 1/2. Reply: 0.5 of the pupils {CAPTION_END}
Question: Which share of the pupils walks? {SAME}
A) yes
B) no
The answer is A

Caption: {CAPTION_START} Right answer: falling. Reply: It rises, then falls. {CAPTION_END}
Question: What is the trend of the blue line? {SAME}
A) yes
B) no
The answer is B

{CAPTION_AND_QUESTION}"""


def reply_judge(verifier: Verifier) -> Verifier:
    """The same model, comparing replies with right answers."""
    return verifier.under(mode=verifier.mode, temperature=verifier.temperature,
                          max_new_tokens=verifier.max_new_tokens, prompt_text=JUDGE_PROMPT)


def judge_replies_(rows: Sequence[dict], pictures: Sequence[Picture], judge: AskVerifier) -> None:
    """Scores anew what is in words and not equal to the right answer. rows: of `tools/prism.py`,
    one for a caption of each picture in `pictures`.

    The judge is asked with yes as the first option and as the second, so that one that likes a
    letter finds nothing the same. `judged` is true if it says yes both times, null if one of its
    replies cannot be read, which counts as false. If it could not be asked, that is the question's
    `failure`.
    """
    unequal = [
        (row, question)
        for row, picture in zip(rows, pictures, strict=True)
        for item, question in zip(picture.items, row["questions"], strict=True)
        if question["score"] == 0 and question.get("prediction")
        and not getattr(item.question, "choices", ())  # an option is right or wrong
    ]
    captions = [f"Right answer: {' or '.join(question['answers'])}. Reply: "
                f"{question['prediction']}" for _, question in unequal]
    asked = [[Asked(f"{question['question']} {SAME}", options, gold, source=0)
              for gold, options in enumerate((("yes", "no"), ("no", "yes")))]
             for _, question in unequal]
    names = [f"{question['id']}:{question['prediction']}:judged" for _, question in unequal]
    answers = judge(captions, asked, names) if unequal else []
    for (row, question), group in zip(unequal, answers, strict=True):
        failure = next((answer.failure for answer in group if answer.failure), "")
        is_read = all(answer.chosen is not None for answer in group)
        is_same = all(answer.chosen == gold for gold, answer in enumerate(group))
        question |= {"judged": is_same if is_read else None, "failure": failure,
                     "score": None if failure else float(is_same),
                     "correct": None if failure else is_same}
        scores = [other["score"] for other in row["questions"] if other["score"] is not None]
        row["accuracy"] = mean(scores)
