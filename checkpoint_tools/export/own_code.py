"""The code of an export: put beside its weights, and told apart from anybody else's.

A directory is only ever loaded with transformers' remote code switched on (``engines/load.py``)
where ``foreign_code`` finds nothing: transformers and Python would look for code in more places
than the files that ``config.json`` names.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from checkpoint_tools.export.formats import code_of
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import LAYOUTS, HFLayout
from megatron_opdlm.model_files.shape import read_json

# What Python imports, or a loader of its.
_IMPORTABLE = (".py", ".pyc", ".pyo", ".pyw", ".so", ".pyd", ".dll", ".dylib", ".pth", ".egg")
_CUSTOM_GENERATE = "custom_generate"  # whose generate.py transformers runs in place of the model's
_ADAPTER = "adapter_config.json"  # names another model, and libraries to import


def copy_code(layout: HFLayout, target: Path) -> None:
    """Put the code of an export of this layout into ``target``."""
    for file in code_of(layout):
        shutil.copyfile(file, target / file.name)


def has_our_code(directory: Path) -> bool:
    """True if an export carries the code that this version writes, and no other."""
    layout = LAYOUTS.get(str(read_json(directory / "config.json").get("model_type")))
    return layout is not None and layout.has_code and not foreign_code(directory)


def foreign_code(directory: Path) -> str:
    """What of a directory could make transformers or Python run code that this version did not
    write, byte for byte; empty where there is nothing.

    Looked at are every file that could be imported, at any depth, and every configuration that can
    name code, of this directory or of another one ("org/repo--module.Class").
    """
    config = read_json(directory / "config.json")
    layout = LAYOUTS.get(str(config.get("model_type")))
    if layout is None:
        return f"model_type={config.get('model_type')!r} is no layout that this version writes"
    expected = {file.name: file.read_bytes() for file in code_of(layout)}
    found: list[str] = []
    for path in _importable(directory):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() and path.is_dir():
            return f"{name} is a link to another directory"
        if name not in expected or path.read_bytes() != expected[name]:
            return f"{name} is no file that this version exports"
        found.append(name)
    if os.path.lexists(directory / _CUSTOM_GENERATE):
        return f"{_CUSTOM_GENERATE} would take the place of the model's generate"
    if os.path.lexists(directory / _ADAPTER):
        return f"{_ADAPTER} names another model and its code"
    missing = sorted(set(expected) - set(found))
    if missing:
        return f"{missing[0]} is missing"
    return _named_elsewhere(directory, layout)


def _importable(directory: Path) -> Iterator[Path]:
    """Files that could be imported, and linked directories, which could hold some."""
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        yield from (here / name for name in sorted(folders) if (here / name).is_symlink())
        yield from (
            here / name for name in sorted(files) if Path(name).suffix.lower() in _IMPORTABLE
        )


def _named_elsewhere(directory: Path, layout: HFLayout) -> str:
    """Code that a configuration names, beyond what the layout has it name."""
    config = read_json(directory / "config.json")
    if (config.get("auto_map") or {}) != layout.auto_map:
        return f"config.json has another auto_map than model_type={layout.model_type!r}"
    for key, value in config.items():
        if key.endswith("implementation") and "/" in json.dumps(value):
            return f"config.json has {key}={value!r}, a kernel from elsewhere"
    for path in sorted(directory.glob("*config*.json")):
        if path.name == "config.json":
            continue
        try:
            names_code = "auto_map" in read_json(path)
        except InputError as error:
            return str(error)
        if names_code:
            return f"{path.name} has an auto_map"
    return ""
