"""What engines and transformers demand of the code of an export, as checks on its files.

The code is parsed, never run.
"""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint_tools.export.own_code import foreign_code
from megatron_opdlm.errors import InputError


def named_classes(directory: Path, config: Mapping[str, Any]) -> str:
    """The classes that ``auto_map`` names exist."""
    entries = config.get("auto_map") or {}
    if not isinstance(entries, dict):
        return f"auto_map={entries!r} is no JSON object"
    for needed in ("AutoConfig", "AutoModelForCausalLM"):
        module, _, name = str(entries.get(needed, "")).rpartition(".")
        file = directory / f"{module}.py"
        if not module:
            return f"auto_map has no {needed}"
        if not file.is_file():
            return f"auto_map names {module}.py, which is missing"
        classes = [node.name for node in _parse(file).body if isinstance(node, ast.ClassDef)]
        if name not in classes:
            return f"{module}.py has no class {name}"
    return ""


def needed_packages(directory: Path, _: Mapping[str, Any]) -> tuple[str, str]:
    """(problem, note): the code imports nothing that is not there.

    ``fused_linear_diffusion_cross_entropy.py`` belongs to SDAR's own modelling file, which imports
    it; ours does not.
    """
    for file in sorted(path for path in directory.glob("*.py") if path.is_file()):
        for node in _parse(file).body:  # what is tried or imported in functions may be missing
            if isinstance(node, ast.ImportFrom) and node.level:
                beside = f"{node.module}.py"
                if not (directory / beside).is_file():
                    return f"{file.name} imports {beside}, which is missing", ""
            for name in _absolute_imports(node):
                if name not in ("torch", "transformers", *sys.stdlib_module_names):
                    return f"{file.name} needs the package {name}", ""
    return "", "fused_linear_diffusion_cross_entropy.py is not needed"


def code_of_others(directory: Path, _: Mapping[str, Any]) -> str:
    """Whatever transformers or Python would run that this version did not write."""
    problem = foreign_code(directory)
    return f"{problem}; the directory's code was not run" if problem else ""


def _absolute_imports(node: ast.stmt) -> list[str]:
    names: list[str | None] = []
    if isinstance(node, ast.Import):
        names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names.append(node.module)
    return [str(name).partition(".")[0] for name in names]


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{file.name} is no Python file ({error})") from None
