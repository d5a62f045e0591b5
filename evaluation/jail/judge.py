"""Runs test code against a program that lives in another process.

Assertions, expected values and the verdict stay in this process; the program's functions and
objects are stood in for by proxies that send arguments and receive values. The program's process is
forked before the tests are in the jail (``process.Driver.stand_by``). So a program cannot reach
what judges it: not the text of the tests, not their frames, not the built-ins they use, not the
channel of the verdict. Names that the test code does not define itself come from the program, but
never built-ins, standard modules or ``typing``'s names. Standard library only.
"""

import builtins
import importlib
import itertools
import os
import sys
import types
import typing
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from evaluation.jail import channel
from evaluation.jail.program import MODULE
from evaluation.jail.values import decode, encode

_FRAME_LIMIT = 64 << 20


class Remote:
    """The program's process, asked one thing at a time."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests, self.replies = requests, replies
        self.callbacks: list[Callable[..., Any]] = []
        self.exceptions: dict[str, type[BaseException]] = {}

    def ask(self, operation: str, target: dict[str, Any], **more: Any) -> Any:
        """The value of an operation. Raises what the program raised, by its built-in class."""
        return self._value(self._answer({"op": operation, **target, **more}))

    def call(
        self, target: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> Any:
        """Call; containers that the program changed are changed here, too."""
        sent = {"args": self.encode(list(arguments)), "kwargs": self.encode(keywords)}
        answer = self._answer({"op": "call", **target, **sent})
        for index, text in answer.get("changed", []):
            _overwrite(arguments[index], decode(text, self._resolve))
        return self._value(answer)

    def encode(self, value: Any) -> str:
        return encode(value, self._export)

    def _value(self, answer: dict[str, Any]) -> Any:
        return decode(answer["value"], self._resolve)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        secret = os.urandom(16).hex()
        channel.send(self.requests, {**request, "id": secret})
        while True:
            answer = channel.receive(self.replies, limit=_FRAME_LIMIT)
            if answer.get("id") != secret:
                raise channel.ChannelClosed("a reply that nobody asked for")
            if "callback" in answer:
                self._call_back(answer)
            elif "raised" in answer:
                raise self._exception(answer["raised"])
            else:
                return answer

    def _call_back(self, ask: dict[str, Any]) -> None:
        try:
            function = self.callbacks[ask["callback"]]
            answer = {"value": self.encode(function(*decode(ask["args"], self._resolve)))}
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        channel.send(self.requests, answer)

    def _export(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Proxy):
            target = object.__getattribute__(value, "_target")
            if "handle" in target:
                return {"t": "handle", "v": target["handle"]}
        if callable(value):
            self.callbacks.append(value)
            return {"t": "callback", "v": len(self.callbacks) - 1}
        return {"t": "object", "type": type(value).__name__, "v": ""}

    def _resolve(self, tagged: dict[str, Any]) -> Any:
        if tagged["t"] != "handle":
            raise KeyError(tagged["t"])
        if "lineage" in tagged:
            return self._exception_class(tagged["lineage"])
        return Proxy(self, {"handle": int(tagged["v"])}, str(tagged["type"]))

    def _exception(self, raised: dict[str, Any]) -> BaseException:
        kind = self._exception_class(raised["lineage"])
        try:
            return kind(raised["text"])
        except TypeError:  # e.g. UnicodeDecodeError wants five arguments
            return RuntimeError(f"{raised['type']}: {raised['text']}")

    def _exception_class(self, lineage: list[str]) -> type[BaseException]:
        """The built-in class of that name, else a class of this process below the built-in one."""
        for depth, name in enumerate(lineage):
            known = getattr(builtins, name, None)
            if isinstance(known, type) and issubclass(known, BaseException):
                for own in reversed(lineage[:depth]):
                    known = self.exceptions.setdefault(own, type(own, (known,), {}))
                return known
        return RuntimeError


def _overwrite(container: Any, content: Any) -> None:
    if isinstance(container, (list, bytearray)):
        container[:] = content
    else:
        container.clear()
        (container.extend if hasattr(container, "extend") else container.update)(content)


class Proxy:
    """An object or a function of the program's process.

    It answers calls, attributes, items and conversions; what is compared or calculated with are
    plain values of this process only, never what the program's own operators say: an object that
    agrees with everything would pass any test. Never equal to a value of this process; equal to
    another proxy if they stand for one object, or for two of one type and the same plain state.
    """

    def __init__(self, remote: Remote, target: dict[str, Any], type_name: str) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_type_name", type_name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._remote.call(self._target, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if "handle" in self._target and name in _PREDICATES:
            raise NotPlain(f"{name} of a {self._type_name}; {_PLAIN_ONLY}")
        return self._remote.ask("attribute", self._target, attribute=name)

    def __setattr__(self, name: str, value: Any) -> None:
        encoded = self._remote.encode(value)
        self._remote.ask("attribute", self._target, attribute=name, value=encoded)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Proxy):
            return False
        return self._target == other._target or _state(self) == _state(other)

    def __hash__(self) -> int:
        return _method(self, "__hash__")

    def __repr__(self) -> str:
        return _method(self, "__repr__")

    def __str__(self) -> str:
        return _method(self, "__str__")

    def __bool__(self) -> bool:
        if _has(self, "__bool__"):
            return _method(self, "__bool__")
        return _method(self, "__len__") > 0 if _has(self, "__len__") else True

    def __instancecheck__(self, instance: object) -> bool:
        if not isinstance(instance, Proxy):
            return False
        handle = object.__getattribute__(instance, "_target")["handle"]
        return self._remote.ask("is_instance", self._target, object=handle) is True


class NotPlain(TypeError):
    """A test compares, or calculates with, an object that is no plain value."""


_PLAIN_ONLY = "only plain values are compared (docs/sandbox.md)"
# What plain values answer with yes or no: a test that asks means to ask a plain value.
_PREDICATES = {
    name
    for kind in (str, bytes, set, frozenset, int, float, dict, list, tuple)
    for name in dir(kind)
    if name.startswith("is") or name in ("startswith", "endswith")
}
_LONGEST = 1_000  # items of an object that is searched


def _state(proxy: Proxy) -> Any:
    """What an object holds, as plain values; an Opaque, equal to nothing, if that is not plain."""
    return proxy._remote.ask("state", proxy._target)


def _contains(proxy: Proxy, item: Any) -> bool:
    """Membership among what the object lists, compared here."""
    listed = list(itertools.islice(cast(Iterable[Any], proxy), _LONGEST + 1))
    if len(listed) > _LONGEST:
        raise NotPlain(f"a {proxy._type_name} of more than {_LONGEST} items; {_PLAIN_ONLY}")
    return item in listed


def _refuse(name: str) -> Callable[..., Any]:
    def refused(self: Proxy, *_: Any) -> Any:
        raise NotPlain(f"{name} of a {self._type_name}; {_PLAIN_ONLY}")

    return refused


def _method(proxy: Proxy, name: str, *arguments: Any) -> Any:
    remote, target = proxy._remote, proxy._target
    return remote.call({**target, "method": name}, arguments, {})


def _has(proxy: Proxy, name: str) -> bool:
    try:
        proxy._remote.ask("attribute", proxy._target, attribute=name)
    except AttributeError:
        return False
    return True


def _forward(name: str) -> Callable[..., Any]:
    def forwarded(self: Proxy, *arguments: Any) -> Any:
        try:
            return _method(self, name, *arguments)
        except AttributeError as error:  # Python's protocols ask with a TypeError in mind
            raise TypeError(str(error)) from error

    return forwarded


_FORWARDED = (
    *("len", "iter", "next", "getitem", "setitem", "delitem", "reversed"),
    *("int", "float", "index", "enter", "exit"),
)
_CALCULATIONS = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"),
    *("lshift", "rshift", "and", "or", "xor"),
)
for _name in _FORWARDED:
    setattr(Proxy, f"__{_name}__", _forward(f"__{_name}__"))
for _name in (
    *("lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "round", "trunc", "floor", "ceil"),
    *(side + name for name in _CALCULATIONS for side in ("", "r", "i")),
):
    setattr(Proxy, f"__{_name}__", _refuse(f"__{_name}__"))
Proxy.__contains__ = _contains  # type: ignore[attr-defined]


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
