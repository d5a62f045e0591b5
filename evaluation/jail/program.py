"""The untrusted side of a jail: runs a program, or serves calls to its functions.

Everything here shares its interpreter with the program, so nothing here is believed: a reply holds
values, never verdicts, and those who read it know the expected values while this process does not.
Standard library only.
"""

import builtins
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from evaluation.jail import channel
from evaluation.jail.values import MAX_DEPTH, decode, encode, tagged

MODULE = "solution"  # what the program is called where its functions are imported
_FRAME_LIMIT = 256 << 20
_MUTABLE = (list, dict, set, bytearray, deque)


def run_as_main(source: str) -> int:
    """Run a program as ``__main__``; its exit status: 1 after an exception, 0 after SystemExit."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except SystemExit:
        return 0
    except BaseException:
        traceback.print_exc(limit=20)
        return 1
    return 0


def silence_prompts() -> None:
    """``input(prompt)`` reads a line of ``sys.stdin``, as ever, but prints no prompt."""

    def read_line(_prompt: object = "", /) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError("EOF when reading a line")
        return line.removesuffix("\n")

    builtins.input = read_line


def load_module(source: str) -> types.ModuleType:
    """Run a program's definitions under the module name ``solution``."""
    module = types.ModuleType(MODULE)
    module.__dict__["__builtins__"] = builtins
    sys.modules[MODULE] = module
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(source, "program.py", "exec"), module.__dict__)
    return module


def description(error: BaseException) -> dict[str, Any]:
    """An exception as data: its class, the classes above it, its text."""
    try:
        text = str(error)[:500]
    except Exception:
        text = ""
    lineage = [kind.__name__ for kind in type(error).__mro__]
    return {"type": type(error).__name__, "lineage": lineage[:20], "text": text}


class Server:
    """Answers requests about the program's functions, and objects if ``keeps_objects``.

    A request carries a secret ``id`` that its reply repeats, so that nothing written ahead of a
    request is taken for its reply.
    """

    def __init__(self, requests: int, replies: int, keeps_objects: bool) -> None:
        self.requests, self.replies = requests, replies
        self.objects: dict[int, Any] = {}
        self.export = self._export if keeps_objects else None
        self.resolve = self._resolve if keeps_objects else None
        self.current: Any = None
        self.instance: Any = None
        self.module = types.ModuleType(MODULE)

    def serve(self) -> None:
        """Until the other side closes the channel."""
        while True:
            try:
                request = channel.receive(self.requests, limit=_FRAME_LIMIT)
            except channel.ChannelClosed:
                return
            if "calls" in request:
                self._call_each(request)
            else:
                channel.send(self.replies, self._reply(request))

    def _call_each(self, request: dict[str, Any]) -> None:
        """Call with one argument list after the other, replying to each, up to an exception."""
        for number, arguments in enumerate(request.pop("calls")):
            start = time.process_time()
            answer = self._reply({**request, "args": arguments})
            own = time.process_time() - start
            channel.send(self.replies, {**answer, "number": number, "own": own})
            if "raised" in answer:
                return

    def _reply(self, request: dict[str, Any]) -> dict[str, Any]:
        self.current = request["id"]
        try:
            answer = _OPERATIONS[request["op"]](self, request)
        except BaseException as error:  # SystemExit too: leaving is no answer
            answer = {"raised": description(error)}
        return {**answer, "id": request["id"]}

    def _target(self, request: dict[str, Any]) -> Any:
        if "handle" in request:
            return self.objects[request["handle"]]
        return self.named(request["name"], request.get("within"))

    def named(self, name: str, within: str | None = None) -> Any:
        """A name of the program's module; with ``within`` a method of that class, if there is one.

        The class is instantiated once for all calls.
        """
        holder = getattr(self.module, within, None) if within else None
        if isinstance(holder, type):
            if self.instance is None:
                self.instance = holder()
            return getattr(self.instance, name)
        try:
            return self.module.__dict__[name]
        except KeyError:
            raise NameError(f"name {name!r} is not defined") from None

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self._target(request)
        if "method" in request:
            target = getattr(target, request["method"])
        arguments = decode(request["args"], self.resolve)
        keywords = decode(request["kwargs"], self.resolve) if "kwargs" in request else {}
        before = self._texts(arguments)
        value = target(*arguments, **keywords)
        after = self._texts(arguments)
        changed = [[i, new] for i, new in after.items() if new != before[i]]
        return {"value": encode(value, self.export), "changed": changed}

    def _texts(self, arguments: list[Any]) -> dict[int, str]:
        if self.export is None:  # nobody asks what became of the arguments
            return {}
        kept = {i: item for i, item in enumerate(arguments) if isinstance(item, _MUTABLE)}
        return {i: encode(item, self.export) for i, item in kept.items()}

    def get(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"value": encode(self._target(request), self.export)}

    def attribute(self, request: dict[str, Any]) -> dict[str, Any]:
        target, name = self._target(request), request["attribute"]
        if "value" in request:
            setattr(target, name, decode(request["value"], self.resolve))
            return {"value": "null"}
        return {"value": encode(getattr(target, name), self.export)}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run the program's definitions; the answer lists its names."""
        self.module = load_module(request["source"])
        return self.names(request)

    def names(self, request: dict[str, Any]) -> dict[str, Any]:
        own = [name for name in self.module.__dict__ if not name.startswith("_")]
        return {"value": encode(own)}

    def is_instance(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"value": encode(isinstance(self.objects[request["object"]], self._target(request)))}

    def state(self, request: dict[str, Any]) -> dict[str, Any]:
        """An object as a plain value: its type and what it holds, without asking its methods."""
        return {"value": encode(self._target(request), _state)}

    def _export(self, value: Any) -> dict[str, Any]:
        handle = len(self.objects) + 1
        self.objects[handle] = value
        tag: dict[str, Any] = {"t": "handle", "v": handle, "type": type(value).__name__}
        tag["callable"] = callable(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            tag["lineage"] = [kind.__name__ for kind in value.__mro__]
        return tag

    def _resolve(self, tagged: dict[str, Any]) -> Any:
        if tagged["t"] == "handle":
            return self.objects[tagged["v"]]
        if tagged["t"] == "callback":
            return self._callback(tagged["v"])
        raise KeyError(tagged["t"])

    def _callback(self, number: int) -> Callable[..., Any]:
        def call_back(*arguments: Any) -> Any:
            ask = {"callback": number, "args": encode(list(arguments), self.export)}
            channel.send(self.replies, {**ask, "id": self.current})
            answer = channel.receive(self.requests, limit=_FRAME_LIMIT)
            if "raised" in answer:
                raise RuntimeError(answer["raised"])
            return decode(answer["value"], self.resolve)

        return call_back


def _state(value: Any, depth: int = 0) -> dict[str, Any]:
    """The tag of a type's name and the attributes in ``__dict__`` and ``__slots__``."""
    if depth > MAX_DEPTH:
        raise RecursionError
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    held |= getattr(value, "__dict__", {})
    if not held or isinstance(value, (type, types.FunctionType, types.ModuleType)):
        return {"t": "object", "type": type(value).__name__, "v": ""}
    inside = {name: tagged(item, lambda v: _state(v, depth + 1)) for name, item in held.items()}
    return {"t": "tuple", "v": [type(value).__name__, {"t": "dict", "v": [*inside.items()]}]}


_OPERATIONS: dict[str, Callable[[Server, dict[str, Any]], dict[str, Any]]] = {
    "call": Server.call,
    "get": Server.get,
    "attribute": Server.attribute,
    "names": Server.names,
    "load": Server.load,
    "is_instance": Server.is_instance,
    "state": Server.state,
}
