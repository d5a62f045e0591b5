"""YAML as configurations need it: mappings, lists, text and null. Refused is what parsers do not
survive: thousands of levels (the compiled one crashes), anchors that hold themselves, and few lines
that stand for millions.
"""

from collections.abc import Sequence
from typing import Any

import yaml

_DEPTH = 50  # levels
_NODES = 1_000_000  # with every alias written out


class _Loader(yaml.SafeLoader):
    """Scalars are text as it stands: YAML 1.1 would read 010 as eight, 12:30:45 as 45045 and off as
    false. A key stands once.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key.value}", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _kept(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"tag:yaml.org,2002:{name}" for name in names)


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] in _kept(("null", "merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: yaml.SafeLoader.yaml_constructors[tag]
    for tag in (*_kept(("null", "map", "seq", "str")), None)
}


def read(text: str) -> Any:
    """Mappings, lists, text and None. YAMLError where the text is no YAML, or none that we take."""
    check(text)
    return yaml.load(text, Loader=_Loader)


def check(text: str) -> None:
    """YAMLError where the text is one of these, or no YAML."""
    sizes: dict[str, int] = {}  # of what an anchor names, in nodes
    opened: list[tuple[str | None, int]] = []  # (anchor, nodes before it)
    nodes = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise yaml.YAMLError(f"the anchor &{event.anchor} holds itself")
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = nodes - before
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
        if len(opened) > _DEPTH:
            raise yaml.YAMLError(f"nested deeper than {_DEPTH} levels")
        if nodes > _NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {_NODES:,} values")
