"""Programs out of responses: fences and nothing else.

EvalPlus' own extraction is in ``code_sanitizer`` (spec of the two kinds here: LiveCodeBench's
``extract_code`` and the reference's domain extractor).
"""

import ast
import builtins
import re
from collections.abc import Iterator

_OPENING = re.compile(r"```[ \t]*([\w+#.-]*)[^`]*$")  # after any text, to the end of the line
_CLOSING = re.compile(r"^\s*```|```\s*$")
_ONE_LINE = re.compile(r"```[ \t]*python[23]?[ \t]+([^`\n]*[^`\s])[ \t]*```", re.IGNORECASE)
_PYTHON = {"python", "py", "python3", "python2"}


def last_fence(text: str) -> str:
    """LiveCodeBench: the lines between the last two lines that contain a fence; else nothing.

    >>> last_fence("```python\\nprint(1)\\n```")
    'print(1)'
    """
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return ""
    return "\n".join(lines[fences[-2] + 1 : fences[-1]])


def fenced_python(text: str, function: str | None = None) -> str:
    """The Python fences of a text, joined by blank lines; any fences where none says Python.

    A fence may open after other text and close at the end of a line of code; one that opens and
    closes in one line counts where there is no other Python fence. ``function``: where one block
    defines it, that block alone (the last that does). No closed fence gives the empty string.

    >>> fenced_python("```python\\nx = 1\\n```\\nthen\\n```python\\ny = 2\\n```")
    'x = 1\\n\\ny = 2'
    """
    found = [(language, body) for language, body in _fenced(text) if body.strip()]
    blocks = [body for language, body in found if language in _PYTHON]
    blocks = blocks or _ONE_LINE.findall(text) or [body for _, body in found]
    if function:
        defining = [block for block in blocks if defines(block, function)]
        if defining:
            return defining[-1]
    return "\n\n".join(blocks)


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """Language, in lower case, and text of each closed fence."""
    language, body = None, []
    for line in text.split("\n"):
        opening = _OPENING.search(line) if line.count("```") == 1 else None
        opens = opening[1].lower() if opening else None
        if language is None or (language == "" and opens in _PYTHON):  # "" was a stray closing
            language, body = opens, []
        elif closing := _CLOSING.search(line):
            yield language, "\n".join([*body, line[: closing.start()]]).rstrip("\n")
            language = None
        else:
            body.append(line)


def defines(source: str, name: str) -> bool:
    """Whether a source defines that function or class, also as a method."""
    return (
        re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", source, re.M)
        is not None
    )


def called_function(assertions: list[str]) -> str | None:
    """The function that assertions are about: the first called name that is no built-in. Where all
    are, the solution has a built-in's name (Mbpp/126: ``sum``): the innermost that all call.
    """
    called: list[list[str]] = []  # by assertion, from the outside in
    for assertion in assertions:
        try:
            tree = ast.parse(assertion)
        except SyntaxError:
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called.append([name.id for name in calls if isinstance(name, ast.Name)])
    for names in called:
        own = [name for name in names if name not in dir(builtins)]
        if own:
            return own[0]
    common = [name for name in (called or [[]])[0] if all(name in names for names in called)]
    return common[-1] if common else None
