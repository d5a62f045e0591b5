"""What a program can do under each combination of the sandbox's layers, found by trying it.

    python -m tests.sandbox_doors

prints the table of docs/sandbox.md: for root and for an ordinary user, each row a combination.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evaluation.jail.isolation import LAYERS, Limits
from evaluation.jail.sandbox import Sandbox
from megatron_opdlm.errors import RunError

REPOSITORY = Path(__file__).resolve().parents[1]
NOBODY = 65534
LIMITS = Limits(memory=1 << 30, file_size=1 << 20, work_space=4 << 20, threads=20)
NAMESPACES = {name for name in LAYERS if name.endswith("namespace")}
RIGHTS = {"unprivileged_user", "user_namespace"}
COMBINATIONS: dict[str, set[str]] = {
    "all": set(LAYERS),
    "no namespaces": set(LAYERS) - NAMESPACES,
    "no namespaces, no Landlock": set(LAYERS) - NAMESPACES - {"landlock"},
    "no namespaces, no seccomp": set(LAYERS) - NAMESPACES - {"seccomp"},
    "namespaces only": NAMESPACES | RIGHTS,
    "none": RIGHTS - NAMESPACES,
}
# What is tried: it succeeds (open), or raises, or is stopped by a limit.
DOORS = {
    "read the user's files": """
tried(lambda: open(m['file']).close())
tried(lambda: open(f"/proc/{m['pid']}/environ").close())
tried(lambda: open(f"/proc/{m['pid']}/stat").close())
""",
    "change the user's files": """
tried(lambda: open(m['file'], 'a').close())
tried(lambda: os.truncate(m['file'], 0))
tried(lambda: os.close(os.open(m['file'], os.O_RDONLY | os.O_TRUNC)))
tried(lambda: os.chmod(m['file'], 0o600))
tried(lambda: os.utime(m['file']))
tried(lambda: os.unlink(m['other']))
""",
    "use the network": """
tried(lambda: socket.create_connection(('127.0.0.1', m['port']), 5))
tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)))
""",
    "reach sockets of the machine": """
tried(lambda: socket.socket(socket.AF_UNIX).connect(m['stream']))
for kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    for place in (m['datagram'], m['abstract']):
        tried(lambda: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b'x', place))
""",
    "act on the user's processes": """
tried(lambda: os.kill(m['pid'], 0))
tried(lambda: os.sched_setaffinity(m['pid'], {0}))
tried(lambda: os.setpriority(os.PRIO_PROCESS, m['pid'], 19))
def on_input():  # seen from outside: the process ends
    r, w = os.pipe()
    fcntl.fcntl(r, fcntl.F_SETOWN, m['pid'])
    fcntl.fcntl(r, 10, signal.SIGTERM)  # F_SETSIG
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
    os.write(w, b'x')
    fail()
tried(on_input)
""",
    "start any number of processes": """
children = []
try:
    for _ in range(m['threads'] + 1):
        children.append(os.fork())
        if not children[-1]: time.sleep(60), os._exit(0)
    opened.append(children)
finally:
    for child in children: os.kill(child, 9), os.wait()
""",
    "use memory beyond the limit": """
tried(lambda: os.ftruncate(os.memfd_create('x'), 1 << 30))
tried(lambda: libc.shmget(0, 1 << 20, 0o1600) + 1 or fail())
""",
    "fill the disk with many files": """
for number in range(8): open(str(number), 'wb').write(bytes(1 << 20))
opened.append(number)
""",
    "start any number of threads": """
threading.stack_size(1 << 16)
for _ in range(m['threads'] + 1):
    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
opened.append(threading)
""",
}
_PROGRAM = """
import ctypes, fcntl, json, os, resource, signal, socket, threading, time
m, found, libc = json.loads(input()), [], ctypes.CDLL(None)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
def fail(): raise OSError
def tried(attack):
    try: attack()
    except OSError: return
    opened.append(attack)
for name, source in m['doors'].items():
    opened = []
    try:
        exec(source)
    except (OSError, RuntimeError): pass
    if opened: found.append(name)
os.write(1, json.dumps(found).encode())
os._exit(0)
"""


@contextmanager
def prey() -> Iterator[dict[str, Any]]:
    """What of the user a program could get hold of: files, servers, a process."""
    place = Path(tempfile.mkdtemp(prefix="prey-"))
    place.chmod(0o755)
    for name in ("file", "other"):
        (place / name).write_text("x" * 100)
        (place / name).chmod(0o600)
    sockets = [socket.create_server(("127.0.0.1", 0))]
    abstract = f"\0{place}"
    for kind, address in (
        (socket.SOCK_STREAM, f"{place}/stream"),
        (socket.SOCK_DGRAM, f"{place}/datagram"),
        (socket.SOCK_DGRAM, abstract),
    ):
        sockets.append(socket.socket(socket.AF_UNIX, kind))
        sockets[-1].bind(address)
        if address != abstract:
            os.chmod(address, 0o777)
    sockets[1].listen()
    victim = subprocess.Popen(["sleep", "600"])
    try:
        yield {
            **{name: f"{place}/{name}" for name in ("file", "other", "stream", "datagram")},
            "abstract": abstract,
            "port": sockets[0].getsockname()[1],
            "pid": victim.pid,
            "ended": lambda: _has_ended(victim),
        }
    finally:
        victim.kill()
        victim.wait()
        for one in sockets:
            one.close()
        shutil.rmtree(place)


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    return process.returncode is not None


def layers_of(name: str, *, root: bool) -> set[str]:
    """Those of a combination: root becomes another user, others take a namespace for that."""
    return COMBINATIONS[name] - {"user_namespace" if root else "unprivileged_user"}


def open_under(layers: set[str]) -> list[str]:
    """The doors that a program of this user finds open. RunError: it cannot be run."""
    sandbox = Sandbox(limits=LIMITS, layers=layers, workers=1, best_effort=True)
    if sandbox.layers != layers:
        raise RunError(f"the kernel grants {sorted(sandbox.layers)} of {sorted(layers)}")
    with prey() as found, sandbox.open() as jail:
        jail.load(_PROGRAM)
        ended = found.pop("ended")
        message = json.dumps({**found, "doors": DOORS, "threads": LIMITS.threads})
        outcome = jail.stdio(message, cpu=30.0)
        if not outcome.ok:
            raise RunError(f"{outcome.status} {outcome.stderr}")
        acted = {"act on the user's processes"} if ended() else set()
    opened = acted | set(json.loads(outcome.stdout))
    return [door for door in DOORS if door in opened]


def measured() -> dict[str, list[str] | str]:
    """Open doors by combination, or why it could not be tried."""
    rows: dict[str, list[str] | str] = {}
    for name in COMBINATIONS:
        try:
            rows[name] = open_under(layers_of(name, root=os.geteuid() == 0))
        except RunError as error:
            rows[name] = str(error)
    return rows


def measured_as(user: int) -> dict[str, list[str] | str]:
    """``measured`` by another process as this user; empty: none can run as that, for example where
    the repository lies in another user's home.
    """
    become = {} if user == os.geteuid() else {"user": user, "group": user, "extra_groups": []}
    for interpreter in ("/usr/bin/python3", sys.executable):  # everybody may read the first
        try:
            done = subprocess.run(
                [interpreter, "-B", "-m", "tests.sandbox_doors", "--measure"],
                stdout=subprocess.PIPE,
                cwd=REPOSITORY,
                timeout=600,
                **become,
            )
        except PermissionError:
            continue
        if done.returncode == 0:
            return json.loads(done.stdout)
    return {}


def lines(user: str, rows: dict[str, list[str] | str]) -> dict[str, str]:
    """Lines of the table by combination; those that could not be tried are left out."""
    return {
        name: " | ".join(
            ["", user, name, *("**open**" if door in found else "refused" for door in DOORS), ""]
        ).strip()
        for name, found in rows.items()
        if isinstance(found, list)
    }


USERS = {"root": 0, "ordinary user": NOBODY}


def table() -> str:
    head = ["started as", "layers", *DOORS]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for user, number in USERS.items():
        text += lines(user, measured_as(number)).values()
    return "\n".join(text)


if __name__ == "__main__":
    print(json.dumps(measured()) if "--measure" in sys.argv else table())
