"""What the kernel takes away from a jail: namespaces, a new root, privileges, Landlock, limits.

Runs inside the jail's own processes (standard library only, Linux only). Every layer is tried by
itself; what is in force is returned as names (``LAYERS``), so that the caller can say what is not.
"""

import contextlib
import os
import resource
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.jail import seccomp as sandbox_seccomp
from evaluation.jail.kernel import check, libc
from evaluation.jail.new_root import LIBRARY_TREES, change_root, work_directory

LAYERS = {
    "unprivileged_user": "programs run as a user without rights",
    "user_namespace": "a user namespace of its own",
    "mount_namespace": "a file system of its own: no home, only libraries, read-only",
    "pid_namespace": "other processes cannot be seen or signalled",
    "network_namespace": "no network device",
    "ipc_namespace": "no shared memory or queues of others",
    "landlock": "Landlock: files outside the working directory are read-only or out of reach",
    "seccomp": "a system-call filter: no sockets, no new processes, no tracing",
}
_NEW_NAMESPACE = {
    "mount_namespace": 0x00020000,
    "pid_namespace": 0x20000000,
    "network_namespace": 0x40000000,
    "ipc_namespace": 0x08000000,
}
_NEW_USER = 0x10000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_SIGKILL = 9


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Sizes in bytes, per program; times are given with each run."""

    memory: int = 4 << 30  # address space
    file_size: int = 32 << 20  # of each file
    work_space: int = 64 << 20  # of all files, where the jail has its own file system
    open_files: int = 64
    threads: int = 64
    output: int = 16 << 20  # standard output and error together, or one returned value
    stack: int = 120 << 20  # room for deep recursion; part of ``memory``


def enter_namespaces(allowed: set[str]) -> set[str]:
    """Leave the machine's namespaces as far as the kernel lets us; the names that worked.

    As root that becomes another user directly, else inside a new user namespace where there may be
    one. The pid namespace holds for children only.
    """
    entered: set[str] = set()
    uid, gid = os.geteuid(), os.getegid()
    another_user = uid == 0 and "unprivileged_user" in allowed
    if "user_namespace" in allowed and not another_user and libc.unshare(_NEW_USER) == 0:
        entered.add("user_namespace")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    for name in _NEW_NAMESPACE:
        if name in allowed and _unshare(name):
            entered.add(name)
    return entered


def _unshare(name: str) -> bool:
    return libc.unshare(_NEW_NAMESPACE[name]) == 0


def isolate(settings: dict[str, Any]) -> set[str]:
    """Take this process out of the machine: the layers in force. OSError: no root of its own."""
    allowed = set(settings["layers"])
    layers = enter_namespaces(allowed)
    if "mount_namespace" in layers:
        space, uid = settings["limits"]["work_space"], settings["uid"]
        settings["work"] = work_directory(settings["trees"])
        change_root(settings["trees"], settings["work"], space, uid)
    another_user = os.geteuid() == 0 and "unprivileged_user" in allowed
    if another_user:
        layers.add("unprivileged_user")
        if "mount_namespace" not in layers:
            os.chown(settings["work"], settings["uid"], -1)
    if "seccomp" in allowed and sandbox_seccomp.is_supported():
        layers.add("seccomp")
    if "landlock" in allowed and landlock_version() > 0:
        layers.add("landlock")
    return layers


def drop_privileges(uid: int) -> None:
    """Become ``uid`` without groups and capabilities, for good. OSError: the kernel refuses."""
    if uid != os.geteuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    header, data = struct.pack("II", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3
    check(libc.capset(header, data), "capset")
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def shield() -> None:
    """Die with the parent; no memory of this process can be read or traced by its own user."""
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


# Landlock's rights by the version of its interface that brought them (linux/landlock.h).
_FS_EXECUTE, _FS_READ_FILE, _FS_READ_DIR, _FS_WRITE_FILE = 1, 4, 8, 2
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_FILE_ONLY = _FS_EXECUTE | _FS_READ_FILE | _FS_WRITE_FILE
_NET_BIND_AND_CONNECT, _SCOPE_SOCKETS_AND_SIGNALS = 3, 3
_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446


def landlock_version() -> int:
    """The kernel's Landlock interface; 0 or less where there is none."""
    return libc.syscall(_SYS_CREATE_RULESET, None, 0, 1)


def landlock(readable: list[str], writable: list[str]) -> None:
    """Only these trees from now on, no TCP, no signals to outside. OSError: the kernel refuses."""
    version = landlock_version()
    check(version < 1, "landlock_create_ruleset")
    rights = max(mask for since, mask in _FS_RIGHTS.items() if since <= version)
    fields = [rights]
    fields += [_NET_BIND_AND_CONNECT] if version >= 4 else []
    fields += [_SCOPE_SOCKETS_AND_SIGNALS] if version >= 6 else []
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = libc.syscall(_SYS_CREATE_RULESET, attributes, len(attributes), 0)
    check(ruleset < 0, "landlock_create_ruleset")
    read = _FS_EXECUTE | _FS_READ_FILE | _FS_READ_DIR
    writable_devices = ["/dev/null", "/dev/zero", "/dev/full"]
    granted = [*((path, read) for path in [*readable, "/dev/random", "/dev/urandom"])]
    granted += [(path, rights) for path in [*writable, *writable_devices]]
    for path, allowed in granted:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = allowed if os.path.isdir(path) else allowed & _FILE_ONLY
            rule = struct.pack("=Qi", allowed, place)
            failed = libc.syscall(_SYS_ADD_RULE, ruleset, 1, rule, 0)
            os.close(place)
            check(failed, f"landlock_add_rule {path}")
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    check(libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def set_limits(limits: Limits, layers: set[str]) -> None:
    """Resource limits of the calling process and what it starts, hard ones."""
    values = {
        resource.RLIMIT_AS: limits.memory,
        resource.RLIMIT_FSIZE: limits.file_size,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: limits.stack,
        resource.RLIMIT_MEMLOCK: 1 << 20,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if layers & {"unprivileged_user", "user_namespace"}:
        # counted per user: without a user of its own the jail would count the machine's processes
        values[resource.RLIMIT_NPROC] = limits.threads
    for kind, value in values.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    with contextlib.suppress(OSError):  # no /proc inside a new root; the parent has done it there
        Path("/proc/self/oom_score_adj").write_text("1000")


def confine(limits: Limits, layers: set[str], interpreter_trees: list[str], work: str) -> None:
    """The last steps of a child that is about to run a program: Landlock, limits, filter."""
    shield()
    if "landlock" in layers:
        own_tmp = ["/tmp"] if "mount_namespace" in layers else []
        landlock([*LIBRARY_TREES, *interpreter_trees], [work, *own_tmp])
    set_limits(limits, layers)
    if "seccomp" in layers:
        sandbox_seccomp.install(layers)
