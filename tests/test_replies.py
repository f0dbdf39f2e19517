# ruff: noqa: RUF001 - Chinese text has its own punctuation
"""What a verifier's reply chooses, and that nothing is read that is not certain."""

import itertools

import pytest

from data import replies
from data.replies import parse_choice
from reward.caprl import ABSTAIN


@pytest.mark.parametrize(
    "reply, choices, want",
    [
        ("B", 4, 1), (" B", 4, 1), ("b", 4, 1), ("(b).", 4, 1), ("**D**", 4, 3), ("C.", 4, 2), ("The answer is C.", 4, 2),
        ("Answer: A", 4, 0), ("B) green", 4, 1), ("D, because it says so", 4, 3), ("(A) red\n", 4, 0), ("green", 4, 1),
        (" Blue.", 4, 2), ("The answer is pink", 4, 3), ("D D D", 4, 3), ("I think B", 4, 1),
        ("A red", 4, 0), ("B green", 4, 1), ("A green", 4, None),
        (" A\n\nthe caption says", 4, 0), ("A because it says so", 4, 0), ("A is right", 4, 0), ("(b) green", 4, 1),
        ("", 4, None), (" ", 4, None), ("E", 4, None), ("E", 5, 4), ("C", 2, None),
        ("Can not answer", 4, None), ("Based on the caption", 4, None), ("A man is there", 4, None), ("I do not know", 4, None),
        ("B or C", 4, None), ("The answer is C, not B", 4, None), ("B) red", 4, None), ("F", 4, None), ("1", 4, None),
        ("A and B", 4, None), ("A or B", 4, None), ("not B", 4, None), ("in the U.S.A.", 4, None),
        ("But B) red", 4, None), ("red green", 4, None), ("AB", 4, None), ("Can't say", 4, None), ("<|im_end|>", 4, None),
    ],
)  # fmt: skip
def test_parse_choice(reply, choices, want):
    texts = ["red", "green", "blue", "pink", ABSTAIN][:choices]
    assert parse_choice(reply, texts) == want


@pytest.mark.parametrize(
    "reply, choices, want",
    [
        ("A", "C. Lee, B. Smith, A. Jones", 0),  # a letter alone is a label, whatever a name begins with
        ("A!", "C. Lee, B. Smith, A. Jones", None), ("C, as said", "A. Jones, B. Smith, C. Lee", 2),
        ("**C)", "A, B, C", 2), ("So A", "B, C, A", None), ("So B", "A, B", 1),  # text and label are the same place, or not
        ("B: red.", "B, red", 1), ("B; 2.5", "20, 2.5, 12, 2", 1),  # its own text follows; 2.5 is not 2
        ("B, B - yes", "no, yes", 1), ("II\nI", "II, III, I", None), ("B) no no dogs are seen", "yes, no", 1),
        ("no. None is there", "no, none", 0), ("red. Blue is there", "red, blue", None),  # "no" may go on, "red" may not
    ],
)  # fmt: skip
def test_a_name_a_label_and_what_follows(reply, choices, want):
    assert parse_choice(reply, choices.split(", ")) == want


def test_parse_choice_where_the_options_are_letters_or_alike():
    assert parse_choice("B", ["B", "A"]) is None  # the first choice's text, the second one's letter
    assert parse_choice("Plan A", ["Plan B", "Plan A"]) == 1 and parse_choice("Grade A", ["x", "Grade A"]) == 1
    assert parse_choice("", ["?", "!", "-", "+"]) is None and parse_choice("5", [".5", "6"]) is None
    assert parse_choice("A", ["A", "B"]) == 0 and parse_choice("B) A", ["B", "A"]) == 1
    assert parse_choice("red", ["red", "dark red"]) == 0
    assert parse_choice("dark red", ["red", "dark red"]) == 1
    assert parse_choice("A.", ["a", "A"]) is None and parse_choice("D, because", ["A", "B", "D", "C"]) is None
    assert parse_choice("F", ["A", "F"]) == 1  # there is no option under F
    assert parse_choice("FF", ["Ff", "FF"]) == 1 and parse_choice("ff", ["Ff", "FF"]) is None
    assert parse_choice("B) FF", ["Ff", "FF"]) == 1 and parse_choice("6'", ["6\"", "6'"]) == 1


@pytest.mark.parametrize(
    "choices",
    [
        ("Point B", "Point D", "Point A", "Point C"), ("5 A", "10 A", "15 A", "20 A"),
        ("10° C", "25° C", "30° C", "40° C"),
        ("Vitamin C", "Vitamin B", "Vitamin A", "Vitamin D"),
        ("Grade A", "Grade B", "Grade D", "none"),
        ("C major", "A minor", "G major", "D minor"), ("Type O", "Type A", "Type B", "Type AB"),
        ("Mr. A", "Mr. B", "Ms. A", "A"),
        ("J. K. Rowling", "C. S. Lewis", "A. A. Milne", "D. H. Lawrence"),
        ("Point (A)", "Point (B)", "Point (C)", "A (D)"),
        ("A-frame", "B-side", "C-section", "D-day"),
        ("A dog", "I see none", "B cell", "C. elegans"), ("C", "C++", "C#", "D. C."),
        ("2", "20", "-2", "2.5"), ("10 %", "10", "1", "0.1"), ("1/2", "1", "2", "1/4"),
        ("3:30", "3", "3:00", "3 - 4"),
        ("red", "red car", "car", "dark red"), ("红色", "绿色", "红色汽车", "A点"), ("一", "一百", "百", "二"),
    ],
)  # fmt: skip
def test_a_reply_that_begins_with_an_option_is_no_other_one_in_any_order(choices):
    """Capitals inside an option ("Point B") were read as the letter of another one, in 18 of 24 orders."""
    replies = ["{}", "{}.", "The answer is {} as stated", "**{}**, because it says so",
               "{} is the highest", "Option: “{}”"]
    for order in itertools.permutations(choices):
        for place, text in enumerate(order):
            for reply in replies:
                read = parse_choice(reply.format(text), order)
                assert read == place or (read is None and len(text) == 1), (reply.format(text), order)


@pytest.mark.parametrize(
    "reply, want",
    [
        ("The answer is B) green because", 1), ("B. green", 1), ("B\n\nExplanation: A is wrong", 1),
        ("option b", 1), ("[B]", 1),
        ("B. The correct answer is B", 1), ("B. Note that A is common", 1),
        ("B, since A and C are not mentioned", 1), ("$B$", 1),
        ("My answer is (b).", 1), ("<think>A or C? The answer is A</think>B", 1),
        ("<answer>B</answer>", 1), ("B<|im_end|>", 1),
        ("The caption says so. The answer is B.", 1), ("A is wrong, so the answer is B", 1),
        ("B\ngreen", 1), ("B - green", 1),
        ("green (B)", 1), ("green, option B", 1), ("The answer is “blue”", 2), ("I’d say B", 1),
        ("（Ｂ）", 1), ("B：green", 1),
        ("选B。", 1), ("应该选B。", 1), ("答案是（B）。", 1), ("答案：Ｂ", 1), ("【B】", 1), ("B、green", 1),
        ("ＧＲＥＥＮ。", 1),
        (r"\boxed{B}", 1), (r"$\boxed{B}$", 1), (r"\[\boxed{\text{B) green}}\]", 1),
        (r"The answer is \(\boxed{B}\).", 1), (r"\boxed{B", 1), (r"\boxed{green}", 1),
        (r"\boxed{B) red}", None), (r"\boxed{A} or \boxed{B}", None), (r"not \boxed{B}", None),
        ("B (green)", 1), ("The answer is B (green).", 1), ("B (red)", None), ("A (green)", None),
        ("B (green) or C", None),
        ("B：red", None), ("B）red", None), ("B。red", None), ("不选B", None), ("不是B", None),
        ("A和B", None), ("B – red", None),
        ("A is wrong", None), ("It isn't A", None), ("A or B?", None), ("A, B", None),
        ("A B C D", None), ("(A) or (B)", None),
        ("A+B", None), ("A/B", None), ("B?", None), ("C\nWait, D", None),
        ("The answer is B. The answer is C", None), ("Look, C. The answer is B.", None),
        ("red or blue", None), ("red, blue", None), ("red and white", None), ("red/blue", None),
        ("red is wrong", None),
        ("red isn't it", None), ("red (B)", None), ("red, option B", None), ("B\nred", None),
        ("greenish", None),
        ("Vitamin C.", None), ("Point B.", None), ("Grade A.", None), ("Type B", None),
        ("A4", None), ("C#", None),
        ("B.C.", None), ("a C", None), ("What about A?", None), ("not green", None),
        ("<think>The answer is B", None),
    ],
)  # fmt: skip
def test_chatty_and_chinese_replies(reply, want):
    assert parse_choice(reply, ["red", "green", "blue", "pink"]) == want


@pytest.mark.parametrize("reply, want", [
    ("No. There is no dog.", 1), ("B) No. There is no dog.", 1), ("No.", 1), ("Yes. It is.", 0), ("No. Yes.", None),
])
def test_a_choice_that_ends_in_a_stop_is_read_as_one_without(reply, want):
    """With the stop "There is no dog" took "No." back."""
    assert parse_choice(reply, ["Yes.", "No."]) == parse_choice(reply, ["Yes", "No"]) == want


@pytest.mark.parametrize(
    "reply, choices, want",
    [
        *((reply, ["2", "3"], None) for reply in ("2 1/2", "2.5", "2,000", "2 %", "20", "-2")),
        *((reply, ["2", "3"], None) for reply in ("2 - 3", "2 or 3", "2/3", "2:30", "2°", "2nd")),
        ("2, not 3", ["2", "3"], 0), ("½", ["1", "2"], None), ("5%", ["5", "6"], None),
        ("B) -5", ["5", "-5"], 1),
        ("B) 2.5", ["2", "2.5"], 1), ("cafe\u0301", ["caf\u00e9", "bar"], 0),
        ("caf\u00e9", ["cafe\u0301", "bar"], 0),
        ("don’t know", ["don't know", "know"], 0), ("don't know", ["don’t know", "know"], 0),
        ("“绿色”", ["红色", "绿色"], 1),
        ("绿色（B）", ["红色", "绿色"], 1), ("绿色（A）", ["红色", "绿色"], None), ("一百", ["一", "二"], None),
        ("A. Lincoln", ["Barack Obama", "Joe Biden", "Abraham Lincoln"], None),
        ("B. Obama", ["Barack Obama", "x"], None),
        ("Yes, no cars", ["Yes", "No"], 0), ("No, yes", ["Yes", "No"], None),
        ("yes or no", ["Yes", "No"], None),
        ("None of the above", ["None", "None of the above"], 1),
        ("A", ["1", "2", "Both A and B"], 0),
        ("Both A and B", ["1", "2", "Both A and B"], 2), ("A dog", ["a man", "a dog"], 1),
        ("A red", ["red", "A red"], 1),
    ],
)  # fmt: skip
def test_replies_and_what_the_options_make_of_them(reply, choices, want):
    assert parse_choice(reply, choices) == want


COLORS = ("red", "green", "blue", "pink")
SMITHS = ("J. Smith", "A. Smith", "B. Smith", "C. Smith")
TIMES = ("10 a.m.", "9 a.m.", "10 p.m.", "12 p.m.")
NINE = tuple(f"x{i}" for i in range(1, 10))


@pytest.mark.parametrize(
    "choices, want, replies",
    [
        # an option that begins like a label, after any words
        (SMITHS, 2, ["Sure! The answer is B. Smith.", "根据描述，答案是B. Smith。"]),
        (SMITHS, 1, ["Based on the caption, the answer is A. Smith"]),
        (SMITHS, None, ["The answer is B. Smithson", "I do not think the answer is B. Smith"]),
        (("Option D", "Option A"), 0, ["It is Option D.", "I would go with Option D, because"]),
        (("选项D", "选项A"), 0, ["应该选选项D", "我认为选项D"]),
        # a sentence that denies
        (COLORS, None, ["I don't think the answer is A.", "It is definitely not option A.", "The wrong answer is A.",
                        "I'd rule out option A.", "Unlike option A, the bar is green.", "Anything but option A",
                        "At first I picked option A.", "不应该选A", "不能选A", "不要选A", "没选A", "别选A", "选A还是选B"]),
        # an option that ends in a full stop
        (TIMES, None, ["10 a.m. is wrong", "9 a.m. or 10 p.m.", "9 a.m., 10 p.m.", "A) 10 p.m."]),
        (TIMES, 0, ["10 a.m.", "10 a.m. is when it opens", "A) 10 a.m.", "The answer is 10 a.m. because it says so"]),
        (("U.S.", "U.K.", "E.U."), None, ["U.S. is not mentioned", "U.K. or E.U.", "B: U.S."]),
        # letter and text
        (COLORS, None, ["**B. red**", "**B) red**.", "A. The answer is blue", "A. It is blue", "A, because it is blue",
                        "The car is blue, answer A"]),
        (COLORS, 0, ["**A. red**", "**A) red**.", "A. The answer is red", "A. It is red", "A, because it is red"]),
        (("not red", "red"), None, ["A) red"]), (("not red", "red"), 1, ["B) red"]),
        (("not red", "red"), 0, ["A) not red", "not red"]),
        (("x", "y", "New York", "York"), None, ["C) York"]), (("x", "y", "New York", "York"), 3, ["D) York"]),
        (("Bill Clinton", "George W. Bush"), None, ["A) George W. Bush"]),
        (("Bill Clinton", "George W. Bush"), 1, ["B) George W. Bush", "B. George W. Bush."]),
        # said, then withdrawn
        (COLORS, None, ["A. Wait, actually B.", "green. No, the correct answer is red.", "A... sorry, B", "red. It's blue",
                        "red was my first thought, but the answer is green", "My first guess was option A.",
                        "red seems right. However, the answer is blue.", "A，不对，应该是B"]),
        # verdicts
        (COLORS, None, ["green cannot be right", "green? No.", "green is unlikely", "green is never mentioned",
                        "green would be wrong", "A: incorrect", "A) red is incorrect", "A, which is wrong", "A：错误",
                        "A (wrong)", "A: ❌", "A. red. This is incorrect.", "green, not supported", "green was ruled out",
                        "green is disqualified", "green is out of the question", "green was crossed out", "green is a decoy",
                        "green is far-fetched", "B) green is discounted", "The answer is B, which is disputed"]),
        # another letter that is right too
        (COLORS, None, ["B, C are both right", "B. A is also right", "B. C is also possible", "B、C都对", "B，C都对",
                        "A，B都正确", "B。A也对", "B、C均正确", "A, B and C are correct", "B. Option A is also right"]),
        # but a name may end in a letter
        (COLORS, 1, ["B. Point A is also marked", "B. Vitamin C is also in it", "B. Team A are both right",
                     "B。图A也是这样", "B，点A、点C都在上面"]),
        (COLORS, 1, ["B, since A and C are not mentioned", "B, because A and C are wrong", "B，因为A和C都没有提到",
                     "B，因为A、C都没提到"]),
        # of a letter only words that agree are taken, whatever the others are
        (COLORS, None, ["(B) is a decoy", "(B) gets vetoed", "B) was close", "(B) must go", "(B) seems odd",
                        "[B] can be struck"]),
        (COLORS, 1, ["(B) is right", "(B) is the correct one", "B is supported by the caption", "(B) is the answer", "(B)"]),
        (COLORS, 1, ["B) green", "B. green because red is not mentioned", "B, the caption says green",
                     "green, because the caption does not mention red", "green; the answer is B", "gr\u00adeen"]),
        (("Yes", "No"), 1, ["No, there is no dog", "No. There isn't a dog", "B) No, it is not"]),
        (("Yes", "No"), None, ["Yes is wrong", "No is wrong", "A) No"]),
        # of another thing than the question's there is none
        (("Yes", "No"), None, ["No information", "no mention of it", "No way to tell", "No answer.", "No one knows",
                               "The answer is no evidence of that", "No dog is mentioned", "No such details are given"]),
        (("Yes", "No"), 1, ["No", "No because it is red", "No the car is red", "No, no information", "No is correct.",
                            "No according to the caption", "No cars are visible", "no dogs",
                            "B) No dogs are seen", "B. No dogs are seen"]),
        (("Yes", "No"), None, ["A) No dogs are seen"]),
        (("No cars", "Two cars"), 0, ["No cars", "no cars are seen"]),
        # all options, one after the other, as far as the reply goes
        (COLORS, None, ["A) red B) green C) blue D) pink", "A. red B. gr", "A: red B: green", "(A) red (B) green",
                        "A - red B - green", "red B. green", "A. red B.", "A、red B、green C、blue", "red B、gr"]),
        (COLORS, 0, ["A) red because of B. Smith", "A) red as in plan b. Smith", "A) red, as in panel B."]),
        # but an option's own last letter is no other's label
        (("Point A", "Point C", "Point B"), 2, ["C. Point B.", "C) Point B", "C - Point B.", "The answer is (C) Point B."]),
        (("Ward C", "Ward B", "Ward A"), 0, ["A. Ward C.", "A) Ward C. The caption says Ward C.", "A. It is in ward C."]),
        (("Yes", "No"), None, ["No caption was given", "No image provided", "No dog mentioned in the caption", "No context",
                               "No conclusion can be drawn", "No comment."]),
        # more choices than one
        (COLORS, None, ["red as well as blue", "A as well as C", "A together with C", "red along with green"]),
        (("Rises", "Falls"), None, ["Rises, then falls", "Rises followed by falls", "A, then B"]),
        (COLORS, 1, ["B. Then comes the reason.", "green! Then it says why.", "green. Together with the sign it says so."]),
        # what the caption says, and then the answer on a line of its own
        (COLORS, 1, ["Based on the caption, the correct answer is:\n\n**B) green**", "It says so. Answer:\nB",
                    "It says so.\n\n**Answer:** B", "It says so. **Answer:**\n\n**B**", "图中是绿色。正确答案是：\n\nB"]),
        (COLORS, None, ["Based on the caption, the correct answer is:\n\n**B) red**"]),
        # amounts and ranges
        (("2", "10", "200"), None, ["2 million", "2 hundred", "10 to 12", "10 x 12", "10 by 12", "10 × 12", "2 and a half",
                                    "10 p.m.", "2 km", "2 万", "2 lakh", "10 percent", "2 thirds"]),
        (("2", "10", "200"), 0, ["2", "2 cars", "2 is right", "A"]),
        (("two", "three"), None, ["two hundred", "two thirds", "two to three"]),
        (("5%", "5"), None, ["5 percent", "5 per cent"]),
        (COLORS, None, ["red to blue", "red vs blue", "red vs. blue", "red through blue"]),
        # I is a word
        (NINE, None, ["I, as an AI, cannot see", "I: cannot", "I. cannot"]),
        (NINE, 8, ["I", "(I)", "I.", "**I**", "I) x9", "The answer is (I)"]),
    ],
)  # fmt: skip
def test_a_choice_that_the_reply_does_not_stay_with_is_not_read(choices, want, replies):
    assert {reply: parse_choice(reply, choices) for reply in replies} == dict.fromkeys(replies, want)


@pytest.mark.parametrize("reply, want", [
    ("绿色。答案是红色", None), ("绿色，描述中说是红色", None), ("B。绿色。正确答案为红色。", None),
    ("绿色，应为红色", None), ("红色。汽车是绿色", None), ("绿色。我选红色", None), ("绿色。汽车是绿色", 1),
    ("红色，因为汽车不是绿色", 0), ("红色，因为绿色没有提到", 0),
    *((reply, None) for reply in ("（A）和（B）", "A）和B）", "红色 和 绿色", "红色 以及 绿色", "**红色** 与 **绿色**",
                                  "红色（A）和绿色（B）", "红色 到 绿色")),
    ("红色（A）", 0), ("A）红色，和描述一致", 0), ("A。和描述一致", 0), ("（A）与描述一致", 0), ("A）和图片相符", 0),
    # 若 is "if", but not in 若干 (several) and 若隐若现 (half seen)
    ("B，图中有若干行人", 1), ("B。若干人站着", 1), ("B，山在雾中若隐若现", 1), ("B，若描述可信", None),
])
def test_a_choice_that_a_chinese_reply_names_after_another_one_is_seen(reply, want):
    """No space is between "是" and what is said to be: "绿色。答案是红色" was read as 绿色."""
    assert parse_choice(reply, ["红色", "绿色", "蓝色"]) == want


@pytest.mark.parametrize("choices, want, replies", [
    (("红色", "绿色", "蓝色"), 1, ["正确选项是B。", "正确的选项为B", "选项B正确", "根据描述，选项B是正确的。", "B是对的",
                                   "正确答案是绿色", "绿色的。", "答案是绿色的", "B（绿色）", "正確選項是B", "B。绿色的"]),
    (("红色", "绿色", "蓝色"), None, [
        "正确的选项不是B", "错误的选项是B", "不正确的选项是B", "干扰选项是B", "选项B不正确", "选项B正确吗", "B正确与否",
        "如果选项B正确，那么是绿色", "选项B正确的可能性很低", "B正确，C也正确", "A、B正确", "A与B正确", "没有选项B正确",
        "选项B是正确的说法不对", "B（红色）", "B（绿色）或A", "浅绿色的", "绿色的车", "绿色的和红色的", "不是绿色的",
        "绿色的，红色的", "绿色的还是红色的",
    ]),
    (("是", "否"), 0, ["是的", "是的，图中有狗", "A。是的"]), (("是", "否"), None, ["不是的", "是的吗", "B。是的"]),
    (("正确", "错误"), 1, ["错误。", "正确答案是错误", "答案是错误"]), (("对", "错"), None, ["B对", "A错"]),
])
def test_common_forms_of_a_chinese_answer_are_read(choices, want, replies):
    """These were counted as wrong. What is asked, denied or said of two choices is still not read."""
    assert {reply: parse_choice(reply, choices) for reply in replies} == dict.fromkeys(replies, want)


@pytest.mark.parametrize("want, replies", [
    (1, ["答案為B", "選B", "我選擇B。", "選項B", "答案為綠色", "B，因為沒有提到A"]),
    (None, ["B：錯誤", "B，錯", "B：無", "B，還是C", "B。選A", "B，其實是A", "別選B", "選A還是選B", "綠色，沒有提到",
            "綠色。答案為紅色", "綠色 萬"]),
])
def test_traditional_signs_are_read_as_simplified_ones(want, replies):
    """"B, 錯" (B, wrong) was read as B, and "選B" was not."""
    read = {reply: parse_choice(reply, ["紅色", "綠色", "藍色"]) for reply in replies}
    assert read == dict.fromkeys(replies, want)


def test_a_reply_without_end_is_read_to_its_4000th_character(monkeypatch):
    """Each lead is passed over by reading what is left: two in 14 characters, 571 and not 14,000."""
    calls, original = [], replies._begun_by
    monkeypatch.setattr(replies, "_begun_by", lambda *args: calls.append(0) or original(*args))
    assert parse_choice("The answer is " * 7000 + "B", ("red", "blue")) is None
    assert 500 < len(calls) < 600
    assert parse_choice("x" * 9000 + "</think>The answer is B", ("red", "blue")) == 1
