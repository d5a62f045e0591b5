"""The ``stages`` of a recipe: answer, warm up, distil, each the recipe with keys of its own
(docs/recipes.md). launch/pipeline.sh runs them one after the other. Imports no torch.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megatron_opdlm.configuration.values import Tree, merged
from megatron_opdlm.errors import InputError, nearest

STAGES = "stages"  # the key of a recipe
Kind = Literal["answer", "warm_up", "distil"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Laid over the recipe before a stage's own keys: the answers of data.path in place of rollouts.
_PRESETS: dict[Kind, Tree] = {
    "answer": {},
    "warm_up": {
        "curriculum": {"kind": "constant"},
        "mixing": {"fraction": 1.0, "kind": "constant", "end_fraction": 0.0, "path": ""},
    },
    "distil": {},
}
_PLACES = ("model.path", "train.out")  # the pipeline's


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """One entry of ``stages``."""

    name: str
    kind: Kind
    evaluate: str | None  # recipe of its evaluation, a path from the recipe's directory
    keys: Tree  # sections, laid over the recipe's

    @property
    def trains(self) -> bool:
        return self.kind != "answer"

    @property
    def has_own_data(self) -> bool:
        return bool((self.keys.get("data") or {}).get("path"))


def read_stages(found: Any, where: str, sections: Iterable[str]) -> list[StageEntry]:
    """The entries of ``stages`` as it stands in a file; [] where it is None. ``sections``: what an
    entry may hold. InputError of one line for a list that cannot be run; what is wrong within a
    section is found where the stage's configuration is built.
    """
    if found is None:
        return []
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}: {STAGES} is a list of at least one stage, '- kind: distil'")
    entries = [_entry(item, f"{where}: stage {i}", [*sections]) for i, item in enumerate(found, 1)]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"{where}: two stages are called {name}; give each a 'name' of its own"
            )
    _check_order(entries, where)
    return entries


def _entry(item: Any, where: str, sections: list[str]) -> StageEntry:
    if not isinstance(item, dict) or "kind" not in item:
        raise InputError(f"{where} is a mapping with a 'kind', one of {', '.join(KINDS)}")
    kind = item["kind"]
    if kind not in KINDS:
        known = nearest(str(kind), KINDS)
        raise InputError(f"{where}: kind {kind!r} is none of {', '.join(KINDS)}{known}")
    valid = ["kind", "name", "evaluate", *sections]
    for key in item:
        if key not in valid:
            raise InputError(f"{where}: no key {key!r}{nearest(str(key), valid)}")
    name, evaluate = item.get("name", kind), item.get("evaluate")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"{where}: name {name!r} is a directory's; use letters, digits, - and _")
    if evaluate is not None and (kind == "answer" or not isinstance(evaluate, str)):
        raise InputError(
            f"{where}: evaluate={evaluate} is the file of a training stage's evaluation; name one, "
            "or leave it out"
        )
    keys = {section: item[section] for section in sections if item.get(section) is not None}
    for section, values in keys.items():
        if not isinstance(values, dict):
            raise InputError(f"{where}: {section}={values} is a section; write its keys below it")
        for key in values:
            if f"{section}.{key}" in _PLACES:
                raise InputError(f"{where}: {section}.{key} is the pipeline's; leave it out")
    return StageEntry(name=name, kind=kind, evaluate=evaluate, keys=keys)


def _check_order(entries: Sequence[StageEntry], where: str) -> None:
    """Every warm-up has answers, all answers are used, and something is trained."""
    if not any(entry.trains for entry in entries):
        raise InputError(f"{where}: no stage trains; add one of kind warm_up or distil")
    waiting: StageEntry | None = None  # an answer stage whose answers nobody has read
    answered = False
    for entry in entries:
        if entry.kind == "answer":
            if waiting is not None:
                break
            waiting, answered = entry, True
        elif entry.kind == "warm_up" and not entry.has_own_data:
            if not answered:
                raise InputError(
                    f"{where}: stage {entry.name} has no answers; put a stage of kind answer "
                    "before it, or give it data.path, a file whose rows have a response"
                )
            waiting = None
    if waiting is not None:
        raise InputError(
            f"{where}: no stage of kind warm_up reads the answers of {waiting.name}; add one after "
            "it, or leave it out"
        )


def named(entries: Sequence[StageEntry], name: str, where: str) -> StageEntry:
    """The stage of this name; InputError where there is none."""
    names = [entry.name for entry in entries]
    if name not in names:
        known = f"{nearest(name, names)}; it has {', '.join(names)}" if names else "; it has none"
        raise InputError(f"{where}: no stage {name!r}{known}")
    return entries[names.index(name)]


def laid_over(tree: Tree, entry: StageEntry) -> Tree:
    """The recipe of a stage."""
    return merged([tree, _PRESETS[entry.kind], entry.keys])


def has_seed(trees: Iterable[Tree]) -> bool:
    """Whether one of a stage's own trees sets ``train.seed``."""
    return any("seed" in (tree.get("train") or {}) for tree in trees)


def of_stage(override: str) -> tuple[str, str] | None:
    """Name and override of ``stages.NAME.section.key=value``; None of an override of all."""
    path, equals, value = override.partition("=")
    parts = path.strip().split(".", 2)
    if parts[0] != STAGES:
        return None
    if not equals or len(parts) < 3:
        raise InputError(
            f"override {override[:80]!r} is not of the form stages.NAME.section.key=value"
        )
    return parts[1], f"{parts[2]}={value}"
