"""Programs out of responses: fences and nothing else.

EvalPlus' own extraction is in ``code_sanitizer`` (spec of the two kinds here: LiveCodeBench's
``extract_code`` and the reference's domain extractor).
"""

import ast
import builtins
import re

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE
)
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

    ``function``: where one block defines it, that block alone (the last that does). No closed fence
    gives the empty string.

    >>> fenced_python("```python\\nx = 1\\n```\\nthen\\n```python\\ny = 2\\n```")
    'x = 1\\n\\ny = 2'
    """
    found = [(language.lower(), body.rstrip("\n")) for language, body in _FENCE.findall(text)]
    blocks = [body for language, body in found if language in _PYTHON]
    blocks = blocks or [body for _, body in found]
    if function:
        defining = [block for block in blocks if defines(block, function)]
        if defining:
            return defining[-1]
    return "\n\n".join(blocks)


def defines(source: str, name: str) -> bool:
    """Whether a source defines that function or class, also as a method."""
    return (
        re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", source, re.M)
        is not None
    )


def called_function(assertions: list[str]) -> str | None:
    """The function that assertions are about: the first called name that is no built-in."""
    for assertion in assertions:
        try:
            tree = ast.parse(assertion)
        except SyntaxError:
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = [called.id for called in calls if isinstance(called, ast.Name)]
        own = [name for name in names if name not in dir(builtins)]
        if own:
            return own[0]
    return None
