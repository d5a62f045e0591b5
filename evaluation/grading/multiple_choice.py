"""The letter that a response chooses, by the paper's rule and by a strict one.

The paper's rule knows four kinds of statement, tried in this order, the last of a kind winning:
a box, "answer" with a colon or an equals sign, "the answer is", and any capital letter that stands
alone. The first two take the first letter of whatever follows, so ``Answer: Because`` chooses B;
the last one takes the pronoun "I" and the article "A". The strict rule asks in all four that the
letter stand alone, be one of the row's own options, and not be one of these words.
"""

import re

# Runs of marks are possessive (``*+``, ``?+``): what follows them is never one of their own, so
# nothing is to be gained by giving one back, and a response of 20,000 blanks costs no more than
# another.
_WRAPPER = r"(?:\\text[a-z]*+\s*+\{\s*+)?"
_ANY_WRAPPER = r"(?:\\(?:text|math)[a-z]*+\s*+\{\s*+)?"
_STATED = r"(?i:\banswer\b)[\s*\"'()\[\]]*+[:=][\s*\"'$(\[{]*+"
_MARKS = r"[\s*\"'$(\[:.]*+"
_IS = (
    rf"(?i:\banswer\b)[\s*\"']*+(?i:\bis\b){_MARKS}"
    rf"(?:(?i:option|choice|letter){_MARKS})?"
)

# An option at the start of its line, as the data files have them: "(A) text" or "A. text".
_OPTION = re.compile(r"^[^\S\n]*+\(?([A-J])[.):]", re.MULTILINE)
_BLANKS = re.compile(r"\s+")

_OPENING = r"[\s*\"'\u201c\u2018`$(\[{]*+"
# Letters of other scripts may touch it: Chinese has no spaces.
_BEFORE = r"(?<![A-Za-z0-9_\u00c0-\u024f\\])"
_STANDS_ALONE = r"(?![A-Za-z0-9_\u00c0-\u024f'\u2019])"
# "A" and "I" before a word in lower case are an article and a pronoun, unless a reason follows.
_NO_WORD = (
    r"(?!(?<=A)\s+(?!because|since|is|it|as|and|or|with|due|must|would|which|by)[a-z])"
    r"(?!(?<=I)\s+(?!because|since|is|due|which|by)[a-z])"
)
# A quote or bracket right before the letter, at most one blank between (runs are collapsed).
_BRACKET = r"[\"'\u201c\u2018(\[*`]"
_IN_BRACKETS = rf"(?:(?<={_BRACKET})|(?<={_BRACKET}\s))"
# What may follow a lower-case letter that stands without brackets after an answer phrase: the end
# of the sentence or a reason; not the rest of a word, an abbreviation or a formula.
_ENDS_SENTENCE = r"(?:[.,;:!?)\]}*]++(?![A-Za-z0-9_\u00c0-\u024f])(?!\s*[=+\-/^<>])|\s*\Z)"
_REASON = r"\s(?:because|since|as|is|due)\b(?![-'\u2019])"


def extract_letter(response: str, letters: str) -> str | None:
    """The chosen letter by the paper's rule, in upper case; None when there is none.

    ``letters``: the allowed ones, e.g. "ABCD".

    >>> extract_letter('{"answer": "c"}', "ABCD")
    'C'
    """
    one = f"([{letters}{letters.lower()}])"
    return _last_match(
        response,
        rf"\\boxed\{{\s*+{_WRAPPER}{one}",
        rf"{_STATED}{one}",
        rf"{_IS}{one}\b",
        rf"\b([{letters}])\b",
    )


def extract_letter_strictly(response: str, letters: str) -> str | None:
    """The chosen letter where it is one without doubt; None otherwise.

    A lower-case letter chooses in a box, in quotes, in brackets, alone on its line after the colon,
    and where its sentence ends or gives a reason after "answer:" or "the answer is".

    >>> extract_letter_strictly("Answer: Because", "ABCD") is None
    True
    """
    response = _BLANKS.sub(lambda run: "\n" if "\n" in run[0] else " ", response)
    opened = re.sub(rf"\A{_OPENING}", "", response)
    one = f"([{letters}])"
    small = f"([{letters.lower()}])"
    marked = f"([{letters}{letters.lower()}])"
    alone = rf"{one}{_STANDS_ALONE}{_NO_WORD}"
    small_alone = rf"{small}(?:{_ENDS_SENTENCE}|{_REASON})"
    enclosed = rf"{_IN_BRACKETS}{marked}\s*[\"'\u201d\u2019)\]*`.]"
    ends_line = rf"{marked}[.)]?[ \t]*(?:\n|$)"
    stated = rf"(?i:\banswer\b){_OPENING}[\"'\u201d*)\]]*+\s*+[:=]"
    return _last_match(
        response,
        rf"\\boxed\{{\s*+{_ANY_WRAPPER}{_OPENING}{marked}\s*[)\].:}}*]",
        rf"{stated}{_OPENING}(?:{enclosed}|{alone}|{ends_line}|{small_alone})",
        rf"{_IS}{_OPENING}(?:{enclosed}|{alone}|{small_alone})",
        *([rf"\A{_OPENING}{one}"] if len(set(_OPTION.findall(opened))) == 1 else []),
        rf"{_BEFORE}{alone}",
    )


def options_of(question: str, letters: str) -> str:
    """The letters that a question offers, from its lines; ``letters`` where it shows none.

    >>> options_of("Which?\\nA. one\\nB. two\\nC. three", "ABCDEFGHIJ")
    'ABC'
    """
    found = set(_OPTION.findall(question))
    offered = ""
    for letter in letters:
        if letter not in found:
            break
        offered += letter
    return offered if len(offered) > 1 else letters


def reference_letter(answer: str) -> str:
    """The reference answer of a row as one upper-case letter: " (b) " -> "B"."""
    return answer.strip().strip("()").strip().upper()


def _last_match(response: str, *families: str) -> str | None:
    for family in families:
        matches = list(re.finditer(family, response))
        if matches:
            return next(group for group in reversed(matches[-1].groups()) if group).upper()
    return None
