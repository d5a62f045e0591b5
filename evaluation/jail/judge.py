"""Runs test code against a program that lives in another process.

Assertions, expected values and the verdict stay in this process; for the program's functions and
objects there are proxies (``remote``). The program's process is forked before the tests are in the
jail (``process.Driver.stand_by``). So a program cannot reach what judges it: not the text of the
tests, not their frames, not the built-ins they use, not the channel of the verdict. Names that the
test code does not define itself come from the program, but never built-ins, standard modules or
``typing``'s names. Standard library only.
"""

import builtins
import importlib
import itertools
import sys
import types
import typing
import unittest
from collections.abc import Callable, Iterator
from typing import Any

from evaluation.jail.program import MODULE
from evaluation.jail.remote import Remote


class Namespace(dict[str, Any]):
    """Globals of the test code: what it does not define itself is looked up in the program."""

    def __init__(self, remote: Remote, name: str) -> None:
        super().__init__(__name__=name, __builtins__=builtins)
        self.remote = remote

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        if name in sys.stdlib_module_names:
            return importlib.import_module(name)
        if hasattr(typing, name):
            return getattr(typing, name)
        if name == "np":
            return importlib.import_module("numpy")
        try:
            return self.remote.ask("get", {"name": name})
        except NameError:
            raise KeyError(name) from None


class Solution(types.ModuleType):
    """``import solution`` in test code."""

    def __init__(self, remote: Remote, offered: list[str], functions: list[str]) -> None:
        super().__init__(MODULE)
        self.__dict__["_remote"] = remote
        hidden = {*dir(builtins), *sys.stdlib_module_names, *dir(typing)} - set(functions)
        self.__dict__["__all__"] = [name for name in offered if name not in hidden]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.__dict__["_remote"].ask("get", {"name": name})
        except NameError:
            raise AttributeError(name) from None


def run(remote: Remote, source: str, tests: dict[str, Any]) -> dict[str, Any]:
    """Run test code against a program's source; stops at the first failure.

    ``tests``: ``setup`` (sources run first, trusted), ``functions`` (names that are the program's
    even if ``setup`` defines them), ``snippets`` (each a test), ``collect`` (run what ``setup``
    defines as pytest or unittest would). Returns ``passed``, ``total`` and ``failure`` (or None).
    """
    space = Namespace(remote, "tests")
    passed, total = 0, 0
    try:
        offered = remote.ask("load", {}, source=source)
        sys.modules[MODULE] = Solution(remote, offered, tests["functions"])
        for source in tests["setup"]:
            exec(compile(source, "tests.py", "exec"), space)
        for name in tests["functions"]:
            space[name] = remote.ask("get", {"name": name})
        cases: list[Callable[[], object]] = [
            _snippet(text, number, space) for number, text in enumerate(tests["snippets"])
        ]
        if tests["collect"]:
            cases += collect(space)
        total = len(cases)
        for case in cases:
            case()
            passed += 1
    except BaseException as error:  # SystemExit too: leaving is no pass
        return {"passed": passed, "total": total, "failure": _described(error)}
    return {"passed": passed, "total": total, "failure": None if total else "no tests"}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _snippet(text: str, number: int, space: Namespace) -> Callable[[], object]:
    code = compile(text, f"test_{number}.py", "exec")
    return lambda: exec(code, space)


class NeedsPytest(Exception):
    """Test code uses what only pytest itself can give (fixtures)."""


def collect(space: dict[str, Any]) -> list[Callable[[], object]]:
    """Test functions, test methods and unittest cases, in the order of their definition."""
    cases: list[Callable[[], object]] = []
    for name, item in list(space.items()):
        if isinstance(item, type) and issubclass(item, unittest.TestCase):
            cases += [_unittest(case) for case in _flat(unittest.defaultTestLoader, item)]
        elif isinstance(item, type) and name.startswith("Test"):
            for method in [method for method in vars(item) if method.startswith("test")]:
                cases += _on_instance(item, method)
        elif isinstance(item, types.FunctionType) and name.startswith("test"):
            cases += _calls(item, item)
    return cases


def _flat(loader: unittest.TestLoader, kind: type[unittest.TestCase]) -> Iterator[Any]:
    yield from loader.loadTestsFromTestCase(kind)


def _unittest(case: unittest.TestCase) -> Callable[[], object]:
    return case.debug  # runs the one test and lets its exception through


def _on_instance(kind: type, method: str) -> list[Callable[[], object]]:
    def run_with(arguments: dict[str, Any]) -> None:
        instance = kind()
        for before in ("setUp", "setup_method"):
            getattr(instance, before, lambda *_: None)(*([None] * (before == "setup_method")))
        getattr(instance, method)(**arguments)

    function = getattr(kind, method)
    return [lambda given=given: run_with(given) for given in _parameters(function, skip=1)]


def _calls(function: Any, target: Callable[..., object]) -> list[Callable[[], object]]:
    return [lambda given=given: target(**given) for given in _parameters(function, skip=0)]


def _parameters(function: Any, skip: int) -> list[dict[str, Any]]:
    """The argument sets of ``pytest.mark.parametrize`` marks, or one empty set."""
    sets: list[dict[str, Any]] = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0]
            names = names.replace(",", " ").split() if isinstance(names, str) else list(names)
            rows = [getattr(row, "values", row) for row in mark.args[1]]
            rows = [row if len(names) > 1 or type(row) is tuple else (row,) for row in rows]
            named = [dict(zip(names, row, strict=False)) for row in rows]
            sets = [{**a, **b} for a, b in itertools.product(sets, named)]
    code = function.__code__
    wanted = code.co_varnames[skip : code.co_argcount]
    defaults = len(function.__defaults__ or ())
    required = wanted[: len(wanted) - defaults]
    if not all(set(required) <= set(given) for given in sets):
        raise NeedsPytest(f"{function.__name__} needs fixtures {required}")
    return sets
