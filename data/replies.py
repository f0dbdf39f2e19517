"""What a verifier's reply chooses: read, or None where it cannot be read for certain."""

import re
from collections.abc import Sequence

from data.choices import LETTERS, SIGNS, UNSEEN, find_choice, fold_choice, fold_text

MOST_READ = 4000
"""Characters of a reply after its thoughts. A reply that repeats itself without end would take as
long as the square of its length."""


def without_thoughts(reply: str) -> str:
    """What is said after the model's thoughts, without marks of special tokens and answers. Empty
    if the thoughts have no end."""
    said = reply.rpartition("</think>")[2]
    return re.sub(r"(?s)<think>.*|<\|[^<>]*\|>|</?answer>", "", said)


def parse_choice(reply: str, choices: Sequence[str]) -> int | None:
    r"""Place of the choice that `reply` names, or None. Case, width and style of letters and signs
    do not matter (`fold_text`).

    Quotes, stars, LaTeX's \boxed{}, "The answer is", "Option", "I think" lead to the answer and are
    passed over. Then
    1. if a choice's text begins the reply, it is that choice. Of several it is the longest. The
       text must end where a word or number ends ("20" is no "2"). Letters within that text ("Point
       B") are no labels. A text of one letter has to be the whole reply.
    2. Else a letter counts where it is a label (`_labelled`).
    3. None if what follows does not stay with it (`_is_kept`).
    """
    said = UNSEEN.sub("", without_thoughts(reply).translate(SIGNS))[:MOST_READ]
    if "\\boxed{" in said:
        said = _BOX.sub(r"\1", _BOX.sub(r"\1", re.sub(r"\\[()\[\]]", "", said)))
    place, rest = _begun_by(said, choices)
    lead = _LEAD.match(said)
    while place is None and lead:
        said = said[lead.end() :]
        place, rest = _begun_by(said, choices)
        lead = _LEAD.match(said)
    if place is None:
        place, rest = _labelled(rest, choices)
    return place if place is not None and _is_kept(place, rest, choices) else None


def _begun_by(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Place of the choice whose text begins `said`, perhaps after its letter ("B green",
    "B (green)"), or None; and the rest, folded."""
    texts = [fold_choice(choice) for choice in choices]
    folded = re.sub(r"[^\S\n]+", " ", fold_text(said)).strip(" ")
    place = find_choice(said, choices)
    if place is not None:
        return place, folded if re.fullmatch("[a-j]", texts[place]) else ""  # maybe a label
    lettered = list(zip(LETTERS.lower(), texts))
    spelled = [*texts, *(f"{letter} {text}" for letter, text in lettered),
               *(f"{letter} ({text})" for letter, text in lettered),
               *(f"{letter}({text})" for letter, text in lettered)]
    begins = [t for t in spelled if folded.startswith(t) and _TEXT_END.match(folded, len(t))]
    longest = max(begins, key=len, default="")
    if spelled.count(longest) != 1 or re.fullmatch("[a-j]? ?", longest):
        return None, folded
    place = spelled.index(longest) % len(choices)
    return place, folded[len(longest) :].removeprefix("的")


def _labelled(said: str, choices: Sequence[str]) -> tuple[int | None, str]:
    """Place of the choice whose label `said`, folded, has first or after "answer is" or "option";
    and the rest. The place is None if there is none. A choice's text that begins there ("B. Smith")
    is meant, not the letter.

    A label stands in brackets, at the end of its clause, or before "because" or "is right". None if
    its sentence denies so far, if there are other labels, if only others' texts are said.
    """
    labels = list(_NAMED.finditer(said))
    label = next((match for match in labels if match["first"] is not None), None)
    before = _SENTENCE_SO_FAR.search(said[: label.start("letter")])[0] if label else ""
    if not label or _DENIAL.search(before) or _WITHDRAWN.search(before):
        return None, said
    for start in (label.start(), label.start("letter")):
        place, rest = _begun_by(said[start:], choices)
        if place is not None:
            return place, rest
    letter, rest = label["letter"], said[label.end() :]
    place = LETTERS.lower().index(letter)
    if place >= len(choices) or len({match["letter"] for match in labels}) > 1:
        return None, said
    if _JUDGED.match(rest) and not _AFFIRMED.match(rest):  # "(B) is a decoy": no list has them all
        return None, said
    texts = [fold_choice(choice) for choice in choices]
    if _begun_by(rest.lstrip(" .:*"), choices)[0] == place:
        return place, rest
    texts_said = _texts_in(said, texts)
    # Another choice's text is "B", or it begins with "B." and more follows than the label
    names = (letter, f"{letter}. ") if rest.strip(" .*") else (letter,)
    is_name = any(i != place and text[:3] in names for i, text in enumerate(texts))
    is_other = bool(texts_said) and texts[place] not in texts_said
    return (None if is_name or is_other else place), rest


def _is_kept(place: int, rest: str, choices: Sequence[str]) -> bool:
    """Whether `rest`, what the folded reply says after it named the choice, leaves it at that.

    Not if it names another choice:
    - a label in any clause, or a letter that is right too;
    - a choice's text right after the named one or after "is";
    - such a text's last words ("B. Obama" for "Barack Obama").
    Nor if it takes the choice back:
    - "and", "or" or "to" go on;
    - its sentence denies ("green is unlikely"), but not after "because";
    - "but" and the like come anywhere.
    """
    texts = [fold_choice(choice) for choice in choices]
    own = texts[place]
    letters = {LETTERS.lower().index(match["letter"])
               for rule in (_NAMED, _TOO) for match in rule.finditer(rest)}
    if letters.intersection(range(len(choices))) - {place}:
        return False
    is_stance = own in ("yes", "是") or _DENIAL.search(own)  # "No, it is not" denies nothing
    following = rest[_BETWEEN.match(rest).end() :]
    other, after = _begun_by(following, choices)
    if other == place:
        rest = after
    elif other is not None and not (is_stance and after.strip(" .!")):
        return False
    if other is None:
        clause = fold_choice(_CLAUSE.match(following)[0])
        ends = [text for text in texts if text.endswith(f" {clause}")]
        if ends and own not in ends:
            return False
    # "A) red B) gre": all options said
    for match in re.finditer(r" ([a-j])(?:[.):\u3001]| -) ?", rest):
        listed, said = LETTERS.lower().index(match[1]), rest[match.end() :]
        if listed == place or listed >= len(texts) or not (said or match.start() == 0):
            continue  # an option's text may end in a letter: "Point B."
        if said[: len(texts[listed])] == texts[listed][: len(said)]:
            return False
    contrast = re.match(r", (?:and )?not ", rest)  # "2, not 3"
    other, after = _begun_by(rest[contrast.end() :] if contrast else "", choices)
    rest = rest if other in (None, place) else after
    says = [_begun_by(rest[match.end() :], choices)[0] for match in _SAYS.finditer(rest)]
    if not {None, place}.issuperset(says) or _GOES_ON.match(rest) or _WITHDRAWN.search(rest):
        return False
    denial = _DENIAL.search(_VERDICT.match(rest)[0])
    goes_on = re.match(r"[,.:;\n]", rest) or rest.startswith(f" {own} ")  # "B) No dogs are seen"
    return not denial or bool(is_stance and goes_on)


def _texts_in(said: str, texts: Sequence[str]) -> set[str]:
    """The texts of more than one letter that `said` has as whole words. Of overlapping ones the
    first, and the longest."""
    longest_first = sorted((t for t in texts if not re.fullmatch("[a-j]?", t)), key=len)[::-1]
    either = "|".join(map(re.escape, longest_first))
    word = r"[^\W\u3000-\u9fff]"  # no Chinese sign: those stand together without spaces
    return set(re.findall(rf"(?<!{word})(?:{either})(?!{word})", said)) if either else set()


# What a reply in LaTeX has in a box, perhaps as text in it; the end may be cut off.
_BOX = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{([^{}]*)(?:\}|$)")

# All but the first two are of folded text. \u3001: comma of Chinese lists; \u2044: bar of a
# fraction; \u2013 and \u2014: dashes.
_LEAD = re.compile(
    r"""[\s:,]+|[*_"'`(\[#>]+|(?:so|thus|therefore)\b|"""
    r"(?:(?:the|my) )?(?:(?:correct|right|best|final) )?"
    r"(?:answer|option|choice)\b(?: (?:is|would be)\b)?|is\b|i (?:think|choose|pick|say)\b|"
    r"i(?:'d| would) (?:say|choose|pick)\b|"
    r"(?:(?:正确的?)?答案|正确的?选项)[是为]?|选[项择]?",
    re.IGNORECASE,
)

# A choice's text ends before a space, sign or bracketed label; a number not before its unit, and
# "no" not where nothing is known ("No information", "no dog is mentioned"). "绿色的" is "绿色".
_TEXT_END = re.compile(
    r"""(?:(?<=[色是])的(?!\w))?(?!\w|(?<=\d)\s?[%‰°'"/\u2044^\d~\u2013-]|"""
    r"""(?<=\d) (?!(?:is|as|in|on|at|it)\b)[a-z]{1,2}\b|"""
    r"(?<=\bno) (?:one (?:knows|can|says)|(?:\w+ ){0,2}(?:information|info|mention|way|idea|answer|"
    r"choice|option|details?|indication|evidence|data|clues?|hints?|reference|description|context|"
    r"comment|conclusion)|(?:[\w-]+ ){1,4}(?:(?:is|are|was|were) )?(?:mentioned|described|stated|"
    r"specified|given|provided|indicated))\b)"
    r"""(?=$|[\s;!?\u3001\u2014]|\.(?![a-z0-9])|[,:](?!\d)|["'*`)\]](?!\w)|\([a-j]\))"""
)

# Words before a label that make any letter count.
_ANSWER_IS = (r"(?:\b(?:answer|option|choice)(?: is)?|"
              r"(?:答案|正确的?选项)[是为]?|(?<!不)选[项择]?)"
              r"(?::\**\s*| ?)")

# Where another clause begins, perhaps with small words.
_CLAUSE_START = (
    r"[,.;:!?\n\u3001]\s*(?:(?:but|so|and|or|then|no|wait)\s+)*| (?:and|or|but|so) |"
    r" [-\u2013\u2014] |(?<![a-z0-9])(?=[(\[])"
)

# Its letter; I is a word unless it stands in brackets or ends the reply.
_LETTER = r"(?P<letter>[a-hj]|i(?=[)\]]|\W*$))(?: (?P=letter)\b)*"

# What is said of a letter, and what of that agrees with it.
_JUDGED = re.compile(r" (?:is|was|seems?|looks?|gets?|has|can|could|may|would|should|must)\b")
_AFFIRMED = re.compile(r" is (?:the )?(?:right|correct|best|answer|supported|most likely)\b|"
                       r" ?是?(?:正确|对)的?(?=[.,;!\n]|\s*$)")

# What may come after a letter without a bracket.
_LABEL_END = (
    r"\s*$|\s*[\n,;!\u3001]|\.(?!\w\b|\s\w\.)|:(?!\d)| [-\u2013\u2014] | (?:because|since|as)\b|"
    + _AFFIRMED.pattern
)

_NAMED = re.compile(
    rf"(?:(?P<first>^|{_ANSWER_IS})|{_CLAUSE_START})"
    rf"""["'*_`$(\[]*{_LETTER}["'*_`$]*(?:[)\]]|(?={_LABEL_END}))"""
)

# A letter that is right beside another one: "B. A is also right", "B、C都对". At the end of a name
# it is none: "B. Point A is also red".
_TOO = re.compile(
    rf"(?:(?<![a-z0-9图表点线组队类楼座])(?<![a-z0-9] )|{_ANSWER_IS}|\band )(?P<letter>[a-j])"
    r"(?: are (?:both |all |also )?(?:right|correct|supported|possible)\b| is also\b|"
    r" ?[都均皆也亦](?![^,.;\n]{0,3}[不没未无错]))"
)

# From the last stop or "so" to the end.
_SENTENCE_SO_FAR = re.compile(
    r"(?:(?!\b(?:so|thus|therefore|hence)\b|, but\b|[.!?;\n]|所以|因此).)*$"
)

# Signs between an answer and what follows, and the first clause of that.
_BETWEEN = re.compile(r"""(?:[\s,:;"'*`)\]\u3001]|\.(?!\d)|[-\u2013\u2014]\s)*""")

_CLAUSE = re.compile(r"(?:(?! because )[^.,:;!?\n\u3001]|[.,:](?=\d))*")

# The sentence about the answer, up to its reason.
_VERDICT = re.compile(
    r"\W*(?:(?!\b(?:because|since|explanation|reason)|因为|由于)(?:[^.!?\n]|\.(?=\w)))*"
)

# Words that make a sentence about an answer a denial, or a doubt.
_DENIAL = re.compile(
    r"n't\b|\b(?:not|cannot|no|never|neither|nor|none|nothing|without|hardly|rarely|barely|wrong|"
    r"false|unlikely|unlike|untrue|impossible|improb\w*|implausible|doubt\w*|rul(?:e[sd]?|ing) "
    r"(?:it |that |this )?out|ruled|exclud\w*|eliminat\w*|reject\w*|dismiss\w*|discard\w*|ignor\w*|"
    r"avoid\w*|refut\w*|contradict\w*|except|besides|than|instead|apart|far from|lacks?|absent|"
    r"missing|mistake\w*|inc\w*rect|inaccurate|invalid|absurd|illogical|"
    r"discount\w*|dis(?:prov|qualif|put|allow|regard|agree)\w*|debunk\w*|den(?:y|ie[sd])|overruled|"
    r"out of the question|off the table|(?:is|was) out|(?:struck|crossed) (?:out|off)|at odds|"
    r"less likely|omit\w*|skip\w*|delet\w*|in(?:consistent|compatible|appropriate)|irrelevant|"
    r"erroneous|questionable|misleading|trap|decoy|red herring|far-?fetched|flawed|faulty|"
    r"un(?:sure|clear|certain|supported|mentioned|suitable|founded|justified|convincing)|"
    r"nobody|might|bad|worst|least|distractor|fails?|too)\b|"
    r"[不没别非无未错否除勿误或\u2717\u2718\u274c\u00d7]|还是|干扰|如果|假如|(?<!\w)若(?!干|有所|隐)"
)

# A choice named after one of these is an answer of its own.
_SAYS = re.compile(
    r"(?:\b(?:is|are|be|was|says?|shows?|means?|pick|choose|select|answer)\b|'s\b|"
    r"(?<!不)[是选为])[: ]*"
    r"""["'*(\[]*(?:(?:the|an?) )?"""
)

# What was said before one of these may not be the last word.
_WITHDRAWN = re.compile(
    r"\b(?:but|however|yet|though|although|wait|actually|instead(?! of)|sorry|correction|oops|hmm+|"
    r"scratch|on second thought|first (?:thought|guess)|at first|initially|rather(?! than)|"
    r"no(?=[,.!:]))\b|但|不过|不对|其实|等等|而是|应该是"
)

# It goes on with more choices or another amount: "red & blue", "9 a.m. or 10 p.m.", "10 to 12".
_GOES_ON = re.compile(
    r"[^\w&+/]*(?:[&+/\u00d7=<>]|(?:and|or|nor)\b)|"
    r"[^\w.!?\n]*(?:then|followed by|as well as|along with|together with)\b|"
    r"""["'*_`)\]]* ?(?:(?:to|through|thru|until|till|vs|versus|x|by|times|of|out of|over|"""
    r"plus|minus|point|per|percent\w*|dozens?|hundreds?|"
    r"thousands?|millions?|billions?|trillions?|crores?|lakhs?|hal(?:f|ves)|thirds?|quarters?|"
    r"fourths?|fifths?|one|two|three|four|five|six|seven|eight|nine|ten|pairs?|"
    r"squared|cubed)\b|\d|[万千百亿十加到至]|以及|"
    r"[和与及跟同](?!描述|图|题|文|原文))"
)
