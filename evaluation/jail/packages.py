"""What programs may read: the interpreter's library and the packages of this environment."""

import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache


def package_directories() -> list[str]:
    """Where programs find packages: this environment's own, the system's and the user's where it
    has them.
    """
    paths = sysconfig.get_paths()
    places = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    return [directory for directory in dict.fromkeys(places) if os.path.isdir(directory)]


def readable_trees(packages: list[str]) -> list[str]:
    """All that an interpreter with these package directories reads, links followed."""
    places = [sys.base_prefix, sys.base_exec_prefix, *packages]
    trees = [tree for place in places for tree in (place, os.path.realpath(place))]
    return list(dict.fromkeys([*trees, *_linked(tuple(packages))]))


@cache
def _linked(packages: tuple[str, ...]) -> list[str]:
    """Packages that are links to elsewhere, or directories of such links (uv makes both)."""
    found = (
        _package_behind(place, link)
        for place in packages
        for entry in os.scandir(place)
        for link in ([entry.path] if entry.is_symlink() else _links(entry))
    )
    return [path for path in dict.fromkeys(found) if os.path.exists(path)]


def _links(entry: "os.DirEntry[str]") -> Iterator[str]:
    """Links right below a directory, or below its directories where it holds nothing else."""
    if not entry.is_dir():
        return
    inside = list(os.scandir(entry))
    yield from (item.path for item in inside if item.is_symlink())
    if all(item.is_dir() and not item.is_symlink() for item in inside):
        for item in inside:
            yield from _links(item)


def _package_behind(place: str, link: str) -> str:
    """The tree that a link stands for: the whole package where it is laid out there as here."""
    real, inside = os.path.realpath(link), os.path.relpath(link, place)
    package = inside.split(os.sep)[0]
    if real.endswith(os.sep + inside):
        return real.removesuffix(inside) + package
    return real
