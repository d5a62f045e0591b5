"""A file system of its own for a jail: libraries, devices, a working directory, and nothing else.

Standard library only, Linux 5.12 and later.
"""

import ctypes
import os
import struct

from evaluation.jail.kernel import check, libc

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _MOVE_MOUNT_EMPTY_PATH, _AT_EMPTY_PATH, _AT_RECURSIVE = 1, 4, 0x1000, 0x8000
_ATTR_READ_ONLY, _ATTR_NOSUID = 1, 2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_BYTES_PER_FILE = 4096  # an empty one takes kernel memory, too
LIBRARY_TREES = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), kind and kind.encode())
    check(libc.mount(*arguments, ctypes.c_ulong(flags), data and data.encode()), f"mount {target}")


def _set_read_only(place: int, path: str, flags: int) -> None:
    attributes = struct.pack("QQQQ", _ATTR_READ_ONLY | _ATTR_NOSUID, 0, 0, 0)
    check(
        libc.syscall(_SYS_MOUNT_SETATTR, place, os.fsencode(path), flags, attributes, 32),
        f"mount_setattr {path}",
    )


def _detached(tree: str) -> int:
    """A copy of a tree's mounts, as a descriptor that outlives whatever hides the tree."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    copy = libc.syscall(_SYS_OPEN_TREE, -100, os.fsencode(tree), flags)
    check(copy < 0, f"open_tree {tree}")
    if tree not in _DEVICES:  # a read-only device node could not be written to
        _set_read_only(copy, "", _AT_RECURSIVE | _AT_EMPTY_PATH)
    return copy


def _attach(copy: int, source_is_directory: bool, target: str) -> None:
    if source_is_directory:
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    failed = libc.syscall(
        _SYS_MOVE_MOUNT, copy, b"", -100, os.fsencode(target), _MOVE_MOUNT_EMPTY_PATH
    )
    os.close(copy)
    check(failed, f"move_mount {target}")


def _is_within(path: str, tree: str) -> bool:
    return path == tree or path.startswith(tree + "/")


def work_directory(trees: list[str]) -> str:
    """The working directory inside a new root: a place that no tree needs."""
    place = "/sandbox"
    while any(_is_within(tree, place) for tree in trees):
        place += "-"
    return place


def change_root(interpreter_trees: list[str], work: str, work_space: int, uid: int) -> None:
    """A root that holds the interpreter's and the system's libraries, devices and ``work``.

    Needs a mount namespace of its own. OSError: the kernel refuses a step; nothing outside of this
    process' namespace has changed then.
    """
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    copies: dict[str, int | None] = {}  # None: a link
    for tree in [*LIBRARY_TREES, *_DEVICES, *interpreter_trees]:
        if os.path.lexists(tree) and not any(_is_within(tree, seen) for seen in copies):
            copies[tree] = None if os.path.islink(tree) else _detached(tree)
    kinds = {tree: os.path.isdir(tree) for tree in copies}
    links = {tree: os.readlink(tree) for tree, copy in copies.items() if copy is None}
    new = "/tmp"  # any directory that exists: what it hides has been copied, or is not needed
    _mount("tmpfs", new, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    if any(_is_within(tree, "/tmp") for tree in copies):
        work_space //= 2
        _writable(new + "/tmp", work_space, uid)
    else:
        os.symlink(work, new + "/tmp")
    _writable(new + work, work_space, uid)
    for tree, copy in copies.items():
        if copy is None:
            os.makedirs(new + os.path.dirname(tree), exist_ok=True)
            os.symlink(links[tree], new + tree)
        else:
            _attach(copy, kinds[tree], new + tree)
    os.chdir(new)
    check(libc.pivot_root(b".", b"."), "pivot_root")
    check(libc.umount2(b".", _MNT_DETACH), "umount2")
    _set_read_only(-100, "/", 0)
    os.chdir(work)


def _writable(place: str, size: int, uid: int) -> None:
    os.mkdir(place)
    room = f"size={size},nr_inodes={size // _BYTES_PER_FILE}"
    _mount("tmpfs", place, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, room)
    os.chown(place, uid, -1)
    os.chmod(place, 0o700)
