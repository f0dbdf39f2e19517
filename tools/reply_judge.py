"""Answers in words that a model compares with the right one, as CharXiv, MathVerse and MathVision
define their scores. A reply that is equal to the right answer is right without being asked about.

Their judges are OpenAI's. Ours is the verifier, with a prompt of our own.
"""

from collections.abc import Sequence

from data.benchmarks.benchmark import Picture
from reward.caprl import CAPTION_END, CAPTION_START, Asked, AskVerifier, Verifier
from tools.stats import mean

SAME = "Does the reply say the same as the right answer?"

JUDGE_TASK = f"""\
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
The answer is B"""


def reply_judge(verifier: Verifier) -> Verifier:
    """The same model, comparing replies with right answers."""
    return verifier.under(mode=verifier.mode, temperature=verifier.temperature,
                          max_new_tokens=verifier.max_new_tokens, task=JUDGE_TASK)


def judge_replies_(rows: Sequence[dict], pictures: Sequence[Picture], judge: AskVerifier) -> None:
    """Scores anew what is in words and not equal to the right answer. rows: of `tools/prism.py`,
    one for a caption of each picture in `pictures`.

    `judged` is then the choice: true, false, or null for a reply of the judge that cannot be read,
    which counts as false. If it could not be asked, that is the question's `failure`.
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
    asked = [[Asked(f"{question['question']} {SAME}", ("yes", "no"), gold=0, source=0)]
             for _, question in unequal]
    names = [f"{question['id']}:{question['prediction']}:judged" for _, question in unequal]
    answers = judge(captions, asked, names) if unequal else []
    for (row, question), (answer,) in zip(unequal, answers, strict=True):
        question["judged"] = None if answer.chosen is None else answer.chosen == 0
        if answer.failure:
            question |= {"score": None, "correct": None, "failure": answer.failure}
        else:
            question |= {"score": float(answer.chosen == 0), "correct": answer.chosen == 0}
        scores = [asked["score"] for asked in row["questions"] if asked["score"] is not None]
        row["accuracy"] = mean(scores)
