"""Trees of a configuration: read from YAML files and their bases, and from overrides.

Every scalar is the text that stands there, or None for ``null``: what a key takes it for is the
key's own matter. Every problem is an ``InputError`` of one line. Imports no torch.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_opdlm import keys
from megatron_opdlm.configuration import yaml_text
from megatron_opdlm.configuration.tree import unknown_key
from megatron_opdlm.errors import InputError, nearest

BASE = "base"  # the key by which a file names the file that it differs from

Tree = dict[Any, Any]


def read_file(file: Path, what: str = "configuration file") -> Tree:
    """The tree of a YAML file laid over that of its base, if it names one, and of that one's."""
    return merged(read_with_bases(file, what))


def read_with_bases(file: Path, what: str) -> list[Tree]:
    """The trees of a YAML file and of all its bases, the last base first, the file itself last."""
    return _with_bases(file, f"{what} {file}", ())


def _with_bases(file: Path, where: str, above: tuple[Path, ...]) -> list[Tree]:
    """The trees of a file and of all its bases, the last base first."""
    here = file.resolve()
    tree = _read_one(file, where)
    base = tree.pop(BASE, None)
    if base is None:
        return [tree]
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}: {BASE} must be the name of a file, e.g. {BASE}: _general.yaml")
    named = file.parent / base
    if named.resolve() in (here, *above):
        raise InputError(f"{where}: {BASE}: {base} leads back to itself; name another file")
    if not named.is_file():
        others = sorted(path.name for path in file.parent.glob("*.yaml") if path != file)
        raise InputError(
            f"{where}: {BASE}: {base} is no file in {file.parent}; correct the name"
            + nearest(base, others)
        )
    return [*_with_bases(named, f"{where}: {BASE} {base}", (here, *above)), tree]


def _read_one(file: Path, where: str) -> Tree:
    try:
        tree = yaml_text.read(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{where} does not exist; configs/ holds ready ones") from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{where} cannot be read: {first_line(error)}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{where}: {_line(error)}{_problem(error)}") from error
    if tree is not None and not isinstance(tree, dict):
        raise InputError(f"{where} must hold sections of keys, as the files in configs/ do")
    return tree or {}


def read_override(kind: type, text: str) -> Tree:
    """The tree of ``section.key=VALUE`` for sections ``kind``: VALUE as it stands for a key that
    holds text or a number, in YAML for one that holds a list or a mapping.
    """
    path, equals, value = text.partition("=")
    section, _, rest = path.strip().partition(".")
    name, _, inner = rest.partition(".")
    if not equals or not section:
        raise InputError(f"override {text[:80]!r} is not of the form section.key=value")
    sections = keys.types_of(kind)
    if section not in sections or (rest and name not in keys.types_of(sections[section])):
        raise unknown_key(kind, path.strip())
    plain = keys.plain_type(keys.types_of(sections[section])[name]) if rest else dict
    if inner and plain is not dict:
        raise unknown_key(kind, path.strip())
    found: Any = value
    if plain in (list, dict) and not inner:
        try:
            found = yaml_text.read(value)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"override {text[:200]!r}: {_problem(error)}") from error
    if not rest:
        return {section: found}
    return {section: {name: {inner: found} if inner else found}}


def merged(trees: Iterable[Tree]) -> Tree:
    """The trees one over the other: mappings key by key, everything else as the last one has it."""
    whole: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            known = whole.get(key)
            if isinstance(known, dict) and isinstance(value, dict):
                whole[key] = merged([known, value])
            else:
                whole[key] = value
    return whole


def resolved(tree: Tree) -> Tree:
    """The tree with every ``${section.key}`` replaced by what it refers to."""
    try:
        whole = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(
            f"configuration: {first_line(error)}; write \\${{ where no reference is meant"
        ) from error
    assert isinstance(whole, dict)
    return whole


def first_line(error: Exception) -> str:
    """Of a library's message."""
    return str(error).partition("\n")[0]


def _problem(error: Exception) -> str:
    return "not valid YAML: " + (getattr(error, "problem", None) or first_line(error))


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark else ""
