"""The architecture's rules, read from the imports (docs of the layout: README, "The tree").

Data flows one way: a stage may import the stages before it, never one after it. The maths is pure
torch, the configuration needs no torch at all, CUDA is named in one directory, and only the modules
that wire a run together see everything.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("megatron_opdlm", "checkpoint_tools", "evaluation")

# Each may import those before it.
FLOW = (
    *("data", "prompts", "off_policy", "rollout", "states", "packing"),
    *("teacher", "divergence", "update", "checkpoint"),
)
# What wires a run together; nothing but these and the commands imports them.
WIRING = (
    "build",
    "session",
    "opening",
    "endings",
    "train",
    "replay",
    "dry_run",
    "in_training_evaluation",
)
COMMANDS = ("import_hf", "export_hf", "verify", "serve_check", "inspect")
# What the losses may import: no process group, no model.
MATHS = ("torch", "megatron_opdlm.diffusion.truncation", "megatron_opdlm.diffusion.denoising")
# Read before anything slow is loaded.
LIGHT = ("config", "configuration", "errors", "keys", "records")
LIGHT_MODULES = tuple(
    f"megatron_opdlm.{name}"
    for name in ("configuration", "errors", "keys", "diffusion.decoding", "engine.options")
)
# Copied into exported directories, so they stand alone.
COPIED = ("blocks", "denoising", "randomness")


def source_files() -> list[Path]:
    return [
        file.relative_to(REPOSITORY)
        for package in PACKAGES
        for file in sorted((REPOSITORY / package).rglob("*.py"))
    ]


FILES = source_files()
MODULES = {".".join(file.with_suffix("").parts) for file in FILES}


def imported_modules(file: Path, text: str) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in the file the import stands."""
    package = list(file.parent.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in MODULES else base


def imports_of(file: Path) -> set[str]:
    return set(imported_modules(file, (REPOSITORY / file).read_text()))


def outside(names: set[str], allowed: tuple[str, ...]) -> set[str]:
    """Names that are neither standard library nor in (or under) an allowed package."""

    def permitted(name: str) -> bool:
        return name.partition(".")[0] in sys.stdlib_module_names or any(
            name == package or name.startswith(package + ".") for package in allowed
        )

    return {name for name in names if not permitted(name)}


def stage(name: str) -> str:
    """``megatron_opdlm.NAME`` or ``megatron_opdlm.NAME.x`` -> NAME; anything else -> ''."""
    parts = name.split(".")
    return parts[1] if parts[0] == "megatron_opdlm" and len(parts) > 1 else ""


def names_in_code(text: str, word: str) -> Iterator[int]:
    """Lines where ``word`` is a name or stands in a string; comments and docstrings left out."""
    docstrings = {
        node.value.lineno
        for node in ast.walk(ast.parse(text))
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


def test_there_is_something_to_read():
    assert len(FILES) > 10
    assert "megatron_opdlm.config" in MODULES


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_keeps_the_rules_of_its_place(file):
    names = imports_of(file)
    parts = file.with_suffix("").parts
    place = parts[1]
    assert not {name for name in names if name.startswith("tests")}
    if file.parent.name == "diffusion":
        pure = "megatron_opdlm.diffusion", "megatron_opdlm.errors", "megatron_opdlm.keys"
        assert not outside(names, ("torch", *(() if parts[-1] in COPIED else pure)))
    if parts == ("megatron_opdlm", "divergence"):
        assert not outside(names, MATHS)
    if parts[0] == "megatron_opdlm" and place in LIGHT:
        light = ("yaml", "omegaconf", *LIGHT_MODULES)
        assert not outside(names, light) - {"megatron_opdlm"}
    if parts[0] == "megatron_opdlm" and place in FLOW:
        later = FLOW[FLOW.index(place) + 1 :]
        assert not {name for name in names if stage(name) in later}
    if parts[0] == "megatron_opdlm" and place not in WIRING:
        assert not {name for name in names if stage(name) in WIRING}
        assert not {name for name in names if name.startswith("evaluation")}
    if parts[0] != "checkpoint_tools":
        commands = {f"checkpoint_tools.{command}" for command in COMMANDS}
        assert not names & commands
    if parts[0] == "checkpoint_tools":
        assert not {name for name in names if name.startswith("evaluation")}
    if parts[0] == "evaluation":
        assert not {name for name in names if stage(name) in ("train", "session", "replay")}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_cuda_is_named_only_under_hardware(file):
    if file.parts[:2] != ("megatron_opdlm", "hardware"):
        assert not list(names_in_code((REPOSITORY / file).read_text(), "cuda"))


def test_prompts_and_rows_do_not_need_megatron():
    for name in ("prompts", "data/rows", "curriculum", "metrics"):
        names = imports_of(Path("megatron_opdlm") / f"{name}.py")
        assert not {module for module in names if module.startswith("megatron.")}


def test_the_reader_sees_every_form_of_import():
    text = (
        "import os.path, torch as t\n"
        "from megatron_opdlm import config\n"
        "from . import errors\n"
        "from .model import x\n"
        "from ..evaluation import run\n"
        "def f():\n    from megatron_opdlm.config import Config\n"
    )
    found = set(imported_modules(Path("megatron_opdlm/prompts.py"), text))
    assert found == {
        "os.path",
        "torch",
        "megatron_opdlm.config",
        "megatron_opdlm.errors",
        "megatron_opdlm.model",
        "evaluation.run",
    }


def test_the_reader_sees_cuda_in_code_but_not_in_prose():
    text = '"""About CUDA."""\n# cuda\nx.cuda()\ny = "cuda:0"\n\ndef f():\n    """cuda"""\n'
    assert list(names_in_code(text, "cuda")) == [3, 4]
    assert not list(names_in_code("model_parallel_cuda_manual_seed(1)\n", "cuda"))
