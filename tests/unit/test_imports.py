"""The architecture's rules, read from the imports: what a drawing of the project must show.

No circle, neither of files nor of rooms, and no import that climbs, imports for type checkers
included. Data flows one way: a stage may import the stages before it, never one after it. The maths
is pure torch, the configuration needs no torch at all, and CUDA is named in one directory.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LIGHT_GROUND = ("errors", "keys", "launcher", "records", "written_values")
# From the ground up: each floor may import itself and those below it. ``launch`` and ``benchmarks``
# stand on the roof.
FLOORS = (
    tuple(f"megatron_opdlm.{name}" for name in LIGHT_GROUND),
    ("megatron_opdlm.diffusion", "megatron_opdlm.model_files"),
    ("megatron_opdlm",),
    ("checkpoint_tools",),
    ("evaluation",),
    ("launch", "benchmarks"),
)
PACKAGES = tuple(name for floor in FLOORS for name in floor if "." not in name)
SHIPPED = ("megatron_opdlm", "checkpoint_tools", "evaluation")
CLIMBER = ("megatron_opdlm.train", "evaluation")  # the only arrow that points up
# Each may import those before it.
FLOW = (
    *("data", "prompts", "off_policy", "rollout", "states", "packing"),
    *("teacher", "divergence", "update", "checkpoint"),
)
# What wires a run together; within megatron_opdlm nothing else imports these.
WIRING = ("run", "train", "replay", "api")
# Started by people; imported by their neighbours at most.
PROGRAMS = (
    *("megatron_opdlm.train", "megatron_opdlm.replay"),
    *("checkpoint_tools.import_hf", "checkpoint_tools.export_hf", "checkpoint_tools.verify"),
    *("checkpoint_tools.serve_check", "checkpoint_tools.inspect"),
)
# What the losses may import: no process group, no model.
MATHS = (
    "torch",
    *(f"megatron_opdlm.diffusion.{name}" for name in ("denoising", "truncation", "wide_product")),
)
# Read before anything slow is loaded.
LIGHT = ("config", "configuration", *LIGHT_GROUND)
# Copied into exported directories, so they stand alone.
COPIED = ("blocks", "denoising", "randomness")

Graph = Mapping[str, Collection[str]]


@cache
def sources() -> dict[str, tuple[Path, ast.Module, str]]:
    """Module name -> its file below the repository, its tree and its text."""
    found = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            text = file.read_text()
            short = file.relative_to(REPOSITORY)
            found[module_of(short)] = (short, ast.parse(text), text)
    return found


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Module name -> full names of everything that it imports."""
    modules = sources().keys()
    return {
        name: set(imported_modules(file, tree, modules))
        for name, (file, tree, _) in sources().items()
    }


def imported_modules(file: Path, tree: ast.Module, modules: Collection[str]) -> Iterator[str]:
    """What a file imports, wherever in it the import stands."""
    package = list(file.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in modules else base


def shipped() -> dict[str, set[str]]:
    return {name: names for name, names in imports().items() if name.split(".")[0] in SHIPPED}


def offences(pairs: Iterator[tuple[str, str]]) -> list[str]:
    """(importer, imported) as lines to read."""
    return sorted({f"{importer} imports {imported}" for importer, imported in pairs})


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def outside(names: Collection[str], allowed: tuple[str, ...]) -> set[str]:
    """Names that are neither standard library nor in (or under) an allowed package."""
    return {
        name
        for name in names
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(below(name, package) for package in allowed)
    }


def room(name: str) -> str:
    """The directory below a package that a module stands in; a file beside them is its own."""
    return ".".join(name.split(".")[:2])


def stage(name: str) -> str:
    """``megatron_opdlm.NAME`` or ``megatron_opdlm.NAME.x`` -> NAME; anything else -> ''."""
    parts = name.split(".")
    return parts[1] if parts[0] == "megatron_opdlm" and len(parts) > 1 else ""


def floor(name: str) -> int:
    """Of the longest name in ``FLOORS`` that the module stands in."""
    levels = {part: level for level, names in enumerate(FLOORS) for part in names}
    return levels[max((part for part in levels if below(name, part)), key=len)]


def circles(graph: Graph) -> list[list[str]]:
    """Shortest ways from a name back to itself, one for each set of names on such a way."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        way = way_back(graph, start)
        found.setdefault(frozenset(way), way)
    return [way for way in found.values() if way]


def way_back(graph: Graph, start: str) -> list[str]:
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:  # grows while it is walked: breadth first
        for name in sorted(graph.get(way[-1], ())):
            if name == start:
                return [*way, start]
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


def test_no_circle_of_files():
    """Claim: whoever reads a file reads down: nothing that it imports leads back to it."""
    graph = {name: names & imports().keys() for name, names in imports().items()}
    assert len(graph) > 100 and "megatron_opdlm.config" in graph
    assert circles(graph) == []


def test_no_circle_of_rooms():
    """Claim: no two directories, nor a directory and a file beside it, need each other."""
    graph: dict[str, set[str]] = {}
    arrows: dict[tuple[str, str], list[str]] = {}
    for name, names in imports().items():
        for other in names & imports().keys():
            here, there = room(name), room(other)
            if here != there:
                graph.setdefault(here, set()).add(there)
                arrows.setdefault((here, there), []).append(f"{name} imports {other}")
    assert not [[arrows[step] for step in pairwise(way)] for way in circles(graph)]


def test_no_import_climbs():
    """Claim: diffusion and model_files are the ground, checkpoint_tools stand above
    megatron_opdlm, evaluation above both; only the training loop reaches up, to evaluation."""
    climbing = (
        (name, other)
        for name, names in imports().items()
        for other in names & imports().keys()
        if floor(other) > floor(name) and not (name == CLIMBER[0] and below(other, CLIMBER[1]))
    )
    assert not offences(climbing)


def test_stages_import_earlier_stages_only():
    later = (
        (name, other)
        for name, names in imports().items()
        for other in names
        if stage(name) in FLOW and stage(other) in FLOW
        if FLOW.index(stage(other)) > FLOW.index(stage(name))
    )
    assert not offences(later)


def test_only_what_wires_a_run_sees_everything():
    wired = (
        (name, other)
        for name, names in imports().items()
        for other in names
        if stage(name) and stage(name) not in WIRING and stage(other) in WIRING
    )
    assert not offences(wired)


def test_programs_are_started_not_imported():
    used = (
        (name, other)
        for name, names in shipped().items()
        for other in names
        if other in PROGRAMS and (name.split(".")[0] != "checkpoint_tools" or stage(other))
    )
    assert not offences(used)


def test_nothing_shipped_needs_the_tests():
    tests = (
        (name, other)
        for name, names in imports().items()
        for other in names
        if below(other, "tests")
    )
    assert not offences(tests)


def test_diffusion_and_divergence_are_pure_torch():
    """Claim: what decides decoding and the loss knows no process group, model or device; the files
    that go into exported directories need nothing of the project."""
    found: list[tuple[str, str]] = []
    for name, names in imports().items():
        last = name.split(".")[-1]
        ours = ("megatron_opdlm.diffusion", "megatron_opdlm.errors", "megatron_opdlm.keys")
        pure = ("torch", *ours)
        if below(name, "megatron_opdlm.diffusion"):
            found += [(name, x) for x in outside(names, pure[:1] if last in COPIED else pure)]
        elif name == "megatron_opdlm.divergence":
            found += [(name, x) for x in outside(names, MATHS)]
    assert not offences(iter(found))


def test_the_configuration_is_light():
    ours = (*LIGHT_GROUND, "configuration", "diffusion.decoding")
    light = ("yaml", "omegaconf", *(f"megatron_opdlm.{name}" for name in ours))
    heavy = (
        (name, other)
        for name, names in imports().items()
        for other in outside(names, light)
        if stage(name) in LIGHT and other != "megatron_opdlm"
    )
    assert not offences(heavy)


def test_prompts_and_rows_do_not_need_megatron():
    for name in ("prompts", "data.rows", "curriculum", "metrics"):
        assert not {x for x in imports()[f"megatron_opdlm.{name}"] if below(x, "megatron")}


def test_cuda_is_named_only_under_hardware():
    named = {
        name: list(names_in_code(tree, text, "cuda"))
        for name, (_, tree, text) in sources().items()
        if name.split(".")[0] in SHIPPED and not below(name, "megatron_opdlm.hardware")
        if "cuda" in text.lower()
    }
    assert not {name: lines for name, lines in named.items() if lines}


def names_in_code(tree: ast.Module, text: str, word: str) -> Iterator[int]:
    """Lines where ``word`` is a name or stands in a string; comments and docstrings left out."""
    docstrings = {
        node.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or token.start[0] in docstrings:
            continue
        name = token.type == tokenize.NAME
        if token.string == word if name else word in token.string.lower():
            yield token.start[0]


def test_the_reader_sees_every_form_of_import():
    text = (
        "import os.path, torch as t\n"
        "from megatron_opdlm import config\n"
        "from . import errors\n"
        "from .model import x\n"
        "from ..evaluation import run\n"
        "def f():\n    from megatron_opdlm.config import Config\n"
        "if TYPE_CHECKING:\n    from megatron_opdlm.data import rows\n"
    )
    modules = imports().keys()
    found = set(imported_modules(Path("megatron_opdlm/prompts.py"), ast.parse(text), modules))
    assert found == {
        "os.path",
        "torch",
        "megatron_opdlm.config",
        "megatron_opdlm.errors",
        "megatron_opdlm.model",
        "megatron_opdlm.data.rows",
        "evaluation.run",
    }


def test_the_reader_sees_circles():
    assert circles({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []
    assert circles({"a": ["b"], "b": ["c"], "c": ["d"], "d": ["c"]}) == [["c", "d", "c"]]


def test_the_reader_sees_cuda_in_code_but_not_in_prose():
    def lines(text: str) -> list[int]:
        return list(names_in_code(ast.parse(text), text, "cuda"))

    prose = '"""About CUDA."""\n# cuda\nx.cuda()\ny = "cuda:0"\n\ndef f():\n    """cuda"""\n'
    assert lines(prose) == [3, 4]
    assert not lines("model_parallel_cuda_manual_seed(1)\n")
