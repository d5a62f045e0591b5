"""What no YAML of ours needs and its parsers do not survive: thousands of levels (the compiled
parser crashes), anchors that hold themselves, and few lines that stand for millions.
"""

import yaml

_DEPTH = 50  # levels
_NODES = 1_000_000  # with every alias written out


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
