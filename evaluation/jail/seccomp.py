"""A system-call filter for generated programs: what a program needs passes, all else is refused.

A classic BPF program (Linux ``Documentation/userspace-api/seccomp_filter.rst``) that allows the
calls of ``system_calls``: memory, threads, descriptors, files, its own signals. No sockets but
pairs of streams, no other processes, no programs, no signals to others, no kernel interfaces that
nobody here has thought of. Refused calls fail with EPERM, so a program sees an ordinary
``PermissionError``; calls newer than the filter seem not to exist, so that the C library falls back
to older ones. Standard library only: the file runs inside the jail.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable

from evaluation.jail import system_calls as calls
from evaluation.jail.kernel import check, libc

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
_X32_BIT = 0x40000000
_FIRST_OF_BOTH = 424  # from here on every architecture has the same numbers: what came since 2019

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
Body = list[Instruction]

_YES: Instruction = (_RETURN, 0, 0, _ALLOW)
_NO: Instruction = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
_UNKNOWN: Instruction = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)

# What glibc and musl make a thread with (linux/sched.h: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM,
# SETTLS, PARENT_SETTID, CHILD_CLEARTID, DETACHED, CHILD_SETTID).
_CLONE_THREAD, _OF_THREADS = 0x10000, 0x17D0F00
_DUPLICATE_AND_LOCK = (0, 1, 2, 3, 5, 6, 7, 1030, 1032)  # fcntl: F_DUPFD to F_SETLKW without SETFL
_SET_FLAGS, _SIGNAL_WHEN_READY = 4, 0x2000  # F_SETFL, O_ASYNC
_TERMINAL_AND_INHERITANCE = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)  # ioctl
_THREAD_NAMES = (15, 16)  # prctl: PR_SET_NAME, PR_GET_NAME
_UNIX, _STREAM, _KIND_OF_SOCKET = 1, 1, 0xF
_WRITES, _TRUNCATES = 0o1103, 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC; O_TRUNC
_ACCESS_AND_TRUNCATES = 0o1003


def _argument(number: int, *, high: bool = False) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * number + 4 * high)


def _one_of(argument: int, values: Iterable[int]) -> Body:
    tests = [step for value in values for step in ((_EQUAL, 0, 1, value), _YES)]
    return [_argument(argument), *tests, _NO]


def _judged(own_pid: int, *, may_write_files: bool) -> dict[str, Body]:
    """What decides on a call by its arguments; every way through ends with a verdict."""
    own, own_or_zero = _one_of(0, [own_pid]), _one_of(0, [0, own_pid])
    no_address = [_argument(4), (_EQUAL, 1, 0, 0), _NO, _argument(4, high=True)]
    return {
        "clone": [
            _argument(0),
            *((_ANY_BIT, 0, 1, 0xFFFFFFFF ^ _OF_THREADS), _NO),
            *((_ANY_BIT, 0, 1, _CLONE_THREAD), _YES, _NO),
        ],
        "kill": own,
        "tgkill": own,
        "prlimit64": own_or_zero,
        "getpgid": own_or_zero,
        "getsid": own_or_zero,
        "sched_getaffinity": own_or_zero,
        "fcntl": [
            _argument(1),
            *((_EQUAL, 0, 4, _SET_FLAGS), _argument(2)),
            *((_ANY_BIT, 0, 1, _SIGNAL_WHEN_READY), _NO, _YES),
            *_one_of(1, _DUPLICATE_AND_LOCK),
        ],
        "ioctl": _one_of(1, _TERMINAL_AND_INHERITANCE),
        "prctl": _one_of(0, _THREAD_NAMES),
        # A pair of datagram sockets could send to any address, a stream cannot.
        "socketpair": [
            *(_argument(0), (_EQUAL, 1, 0, _UNIX), _NO),
            *(_argument(1), (_AND, 0, 0, _KIND_OF_SOCKET), (_EQUAL, 0, 1, _STREAM), _YES, _NO),
        ],
        "sendto": [*no_address, (_EQUAL, 0, 1, 0), _YES, _NO],
        "open": _opening(1, may_write_files),
        "openat": _opening(2, may_write_files),
    }


def _opening(flags: int, may_write_files: bool) -> Body:
    """By flags: all of them, but truncating what is opened to read, which old Landlock lets pass;
    reading only where nothing else keeps files from being written.
    """
    if not may_write_files:
        return [_argument(flags), (_ANY_BIT, 0, 1, _WRITES), _NO, _YES]
    alone = ((_AND, 0, 0, _ACCESS_AND_TRUNCATES), (_EQUAL, 0, 1, _TRUNCATES))
    return [_argument(flags), *alone, _NO, _YES]


def may_write_files(layers: set[str]) -> bool:
    """Whether the filter lets files be written: only where another layer says which."""
    return bool(layers & {"mount_namespace", "unprivileged_user", "landlock"})


def filter_program(machine: str, own_pid: int, layers: set[str]) -> list[Instruction]:
    """The instructions for one architecture, beside these other layers. KeyError: no table for
    that machine.
    """
    column, audit_arch = _ARCHITECTURES[machine]
    may_write = may_write_files(layers)
    allowed = [calls.MEMORY_AND_THREADS, calls.DESCRIPTORS, calls.LOOKING, calls.SELF]
    allowed += [calls.TIME_AND_SIGNALS]
    allowed += [calls.NAMES] if may_write else []
    allowed += [calls.MODES] if layers & {"mount_namespace", "unprivileged_user"} else []
    program: list[Instruction] = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_EQUAL, 1, 0, audit_arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32_BIT), _NO]
    for numbers in [numbers for group in allowed for numbers in group.values()]:
        if numbers[column] is not None:
            program += [(_EQUAL, 0, 1, numbers[column] or 0), _YES]
    for name, body in _judged(own_pid, may_write_files=may_write).items():
        number = calls.JUDGED[name][column]
        if number is not None:
            program += [(_EQUAL, 0, len(body), number), *body]
    return [*program, (_AT_LEAST, 0, 1, _FIRST_OF_BOTH), _UNKNOWN, _NO]


def is_supported() -> bool:
    """Whether there is a table for this machine and Python runs as a 64-bit process."""
    return platform.machine() in _ARCHITECTURES and struct.calcsize("P") == 8


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(layers: set[str]) -> None:
    """Put the calling process, for good, under the filter. OSError: the kernel refuses."""
    instructions = filter_program(platform.machine(), os.getpid(), layers)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(instructions), ctypes.cast(buffer, ctypes.c_void_p))
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    check(
        libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0),
        "prctl(PR_SET_SECCOMP)",
    )
