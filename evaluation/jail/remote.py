"""The program's process as test code sees it: for its functions and objects there are proxies that
send arguments and receive values. Standard library only.
"""

import builtins
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any, cast

from evaluation.jail import channel
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
