"""A system-call filter for generated programs: one process, no sockets, no signals to others.

The filter is a classic BPF program (Linux ``Documentation/userspace-api/seccomp_filter.rst``) that
lets everything pass except what a benchmark's program has no use for: new processes, programs,
sockets, tracing, namespaces, mounts, keys, clocks, kernel interfaces. Denied calls fail with EPERM,
so a program sees an ordinary ``PermissionError``. Threads stay possible. Standard library only: the
file runs inside the jail.
"""

import ctypes
import errno
import os
import platform
import struct

# name -> (x86_64, aarch64); None: the architecture has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "syslog": (103, 116),
    "personality": (135, 92),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "iopl": (172, None),
    "ioperm": (173, None),
}
# Judged by their first argument.
_CLONE, _CLONE3 = (56, 220), 435
_OWN_PROCESS_ONLY = {"kill": (62, 129), "tgkill": (234, 131)}
_OWN_PROCESS_OR_ZERO = {"prlimit64": (302, 261)}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENT_0 = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def filter_program(machine: str, own_pid: int) -> list[Instruction]:
    """The instructions for one architecture. KeyError: no table for that machine."""
    column, audit_arch = _ARCHITECTURES[machine]
    allow, deny = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_EQUAL, 1, 0, audit_arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32_BIT), deny]
    # clone3 hides its flags behind a pointer; told that it does not exist, the C library uses clone
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), deny]
    argument = (_LOAD, 0, 0, _OFFSET_ARGUMENT_0)
    program += [
        (_EQUAL, 0, 4, _CLONE[column]),
        argument,
        (_ANY_BIT, 0, 1, _CLONE_THREAD),
        allow,
        deny,
    ]
    for numbers in _OWN_PROCESS_ONLY.values():
        program += [(_EQUAL, 0, 4, numbers[column]), argument]
        program += [(_EQUAL, 0, 1, own_pid), allow, deny]
    for numbers in _OWN_PROCESS_OR_ZERO.values():
        program += [(_EQUAL, 0, 5, numbers[column]), argument]
        program += [(_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, own_pid), allow, deny]
    return [*program, allow]


def is_supported() -> bool:
    """Whether there is a table for this machine and Python runs as a 64-bit process."""
    return platform.machine() in _ARCHITECTURES and struct.calcsize("P") == 8


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(libc: ctypes.CDLL) -> None:
    """Put the calling process, for good, under the filter. OSError: the kernel refuses."""
    instructions = filter_program(platform.machine(), os.getpid())
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(instructions), ctypes.cast(buffer, ctypes.c_void_p))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
