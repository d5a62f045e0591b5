"""EvalPlus' ``sanitize``, fit for long responses; loaded into a jail by ``code_evalplus``.

EvalPlus tries every span of lines as Python and keeps the longest: quadratic in the lines, whether
they are Python from end to end or prose that follows a program. Here a span is tried only where the
parser has not refused the same lines already, which gives the same span.
"""

import ast
import sys
from functools import lru_cache
from itertools import accumulate

import evalplus.sanitize
from evalplus.syncheck import syntax_check

sys.setrecursionlimit(20_000)
_ALLOW_INCOMPLETE = 0x4000  # codeop's flag: an end met too early has a message of its own


@lru_cache(maxsize=1)  # EvalPlus asks twice where a text defines nothing that it wants
def longest_python(text: str) -> str:
    """The span of two lines or more that parses and has the most lines that are not blank.

    Among equals the first start, then the first end; the first line alone where nothing parses.
    """
    lines = text.split("\n")
    filled = [0, *accumulate(bool(line.strip()) for line in lines)]  # before each line
    best, found = 0, lines[0]
    for start in range(len(lines) - 1):
        if filled[-1] - filled[start] <= best:
            break
        for end in range(_refused_from(lines, start), start + 1, -1):
            count = filled[end] - filled[start]
            if count <= best:
                break
            if syntax_check("\n".join(lines[start:end])):
                best, found = count, _first_of(lines, filled, start, end)
                break
    return found


def _first_of(lines: list[str], filled: list[int], start: int, end: int) -> str:
    """The shortest span of that start and count that parses: without blank lines at its end."""
    shorter = range(max(filled.index(filled[end]), start + 2), end)
    spans = ("\n".join(lines[start:stop]) for stop in (*shorter, end))
    return next(span for span in spans if syntax_check(span))


def _refused_from(lines: list[str], start: int) -> int:
    """The largest end for which ``lines[start:end]`` may be Python: whatever follows, one line more
    is refused. Looked for at twice the distance each time, then by halving.
    """
    good, bad = start + 1, min(start + 2, len(lines))
    while not _is_refused("\n".join(lines[start:bad])):
        if bad == len(lines):
            return bad
        good, bad = bad, min(start + 2 * (bad - start), len(lines))
    while bad - good > 1:
        middle = (good + bad) // 2
        if _is_refused("\n".join(lines[start:middle])):
            bad = middle
        else:
            good = middle
    return good


def _is_refused(text: str) -> bool:
    """Whether the parser gives up before it has seen the end, so that no line more can help."""
    try:
        compile(text, "response", "exec", ast.PyCF_ONLY_AST | _ALLOW_INCOMPLETE)
    except SyntaxError as error:
        return error.msg != "incomplete input"
    return False


def sanitized(text: str, entry_point: str) -> str:
    """The program that EvalPlus would run; empty where its extraction raises."""
    evalplus.sanitize.code_extract = longest_python
    try:
        return evalplus.sanitize.sanitize(text, entry_point)
    except Exception:
        return ""
