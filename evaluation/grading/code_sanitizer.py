"""EvalPlus' ``sanitize``, fit for long responses; loaded into a jail by ``code_evalplus``.

EvalPlus tries every span of lines as Python and keeps the longest: quadratic in the lines even of a
text that is Python from end to end. Trying the longest spans first gives the same span.
"""

import sys
from bisect import bisect_left, bisect_right
from itertools import accumulate

import evalplus.sanitize
from evalplus.syncheck import syntax_check

sys.setrecursionlimit(20_000)


def longest_python(text: str) -> str:
    """The span of two lines or more that parses and has the most lines that are not blank.

    Among equals the first start, then the first end; the first line alone where nothing parses.
    """
    lines = text.split("\n")
    filled = [0, *accumulate(bool(line.strip()) for line in lines)]  # before each line
    for wanted in range(filled[-1], 0, -1):
        for start in range(len(lines) - 1):
            if filled[-1] - filled[start] < wanted:
                break
            first = max(bisect_left(filled, filled[start] + wanted) - 1, start + 1)
            last = bisect_right(filled, filled[start] + wanted) - 1
            for end in range(first, last):
                span = "\n".join(lines[start : end + 1])
                if syntax_check(span):
                    return span
    return lines[0]


def sanitized(text: str, entry_point: str) -> str:
    """The program that EvalPlus would run; empty where its extraction raises."""
    evalplus.sanitize.code_extract = longest_python
    try:
        return evalplus.sanitize.sanitize(text, entry_point)
    except Exception:
        return ""
