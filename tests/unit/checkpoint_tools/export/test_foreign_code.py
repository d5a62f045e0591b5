"""Claims: no code of an export runs but what this version wrote, byte for byte, wherever Python or
transformers would find other code; and such a directory is named as what it is."""

import json
import os
import py_compile
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_tools import comparisons, verify
from checkpoint_tools.engines.load import problem_of_loading
from checkpoint_tools.export.own_code import foreign_code, has_our_code
from megatron_opdlm.model_files.manifest import read_manifest
from tests.exported import make_export
from tests.tiny_models import edit_json

EXTENSION = "blocks.cpython-311-x86_64-linux-gnu.so"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint`` and ``export``."""
    root = tmp_path_factory.mktemp("made")
    make_export(root, model_format="sdar", dtype="fp32")
    return root


@pytest.fixture
def export(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "export", tmp_path / "export"))


def put(directory: Path, name: str, before: str = "") -> None:
    """A Python file that makes ``proof`` beside the export where it is run."""
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    text = f"import os\nos.makedirs({str(directory.parent / 'proof')!r}, exist_ok=True)\n"
    file.write_text(text + before)


def package_before_module(directory: Path) -> None:
    put(directory, "blocks/__init__.py", (directory / "blocks.py").read_text())


def compiled(directory: Path) -> None:
    put(directory, "evil.py")
    cached = directory / "__pycache__" / "blocks.cpython-311.pyc"
    py_compile.compile(str(directory / "evil.py"), str(cached))
    (directory / "evil.py").unlink()


def custom_generate(directory: Path) -> None:
    put(
        directory, "custom_generate/generate.py", "def generate(model, ids, **_):\n    return ids\n"
    )


def tokenizer_below(directory: Path) -> None:
    put(directory, "sub/evil.py", "class Evil:\n    pass\n")
    code = {"AutoTokenizer": ["sub/evil.Evil", None]}
    edit_json(directory / "tokenizer_config.json", auto_map=code)


def linked_directory(directory: Path) -> None:
    put(directory.parent / "elsewhere", "__init__.py")
    (directory / "blocks").symlink_to(directory.parent / "elsewhere")


def named(file: str, **keys: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | keys))

    return change


ELSEWHERE = {"AutoTokenizer": ["org/repo--mod.Class", None]}
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a package before a module": (package_before_module, "blocks/__init__.py is no file"),
    "an extension before a module": (lambda d: (d / EXTENSION).touch(), f"{EXTENSION} is no file"),
    "a compiled module": (compiled, "__pycache__/blocks.cpython-311.pyc is no file"),
    "generate of its own": (custom_generate, "custom_generate/generate.py is no file"),
    "an empty custom_generate": (lambda d: (d / "custom_generate").mkdir(), "take the place of"),
    "a tokenizer below": (tokenizer_below, "sub/evil.py is no file"),
    "a linked directory": (linked_directory, "blocks is a link to another directory"),
    "another byte": (lambda d: (d / "blocks.py").open("a").write("\n"), "blocks.py is no file"),
    "a module less": (lambda d: (d / "blocks.py").unlink(), "blocks.py is missing"),
    "a module more": (lambda d: (d / "evil.py").touch(), "evil.py is no file"),
    "a tokenizer of another repository": (
        named("tokenizer_config.json", auto_map=ELSEWHERE),
        "tokenizer_config.json has an auto_map",
    ),
    "a processor of another repository": (
        named("processor_config.json", auto_map=ELSEWHERE),
        "processor_config.json has an auto_map",
    ),
    "a model of another repository": (
        named("config.json", auto_map={"AutoModelForCausalLM": "org/repo--mod.Class"}),
        "config.json has another auto_map",
    ),
    "an adapter": (
        named("adapter_config.json", base_model_name_or_path="org/repo"),
        "adapter_config.json names another model",
    ),
    "a kernel from elsewhere": (
        named("config.json", attn_implementation="org/kernel"),
        "attn_implementation='org/kernel'",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_directory_with_other_code_is_not_loaded(export: Path, case: str) -> None:
    spoil, reason = FOREIGN[case]
    assert foreign_code(export) == "" and has_our_code(export)
    spoil(export)
    assert reason in foreign_code(export) and not has_our_code(export)
    assert "its code was not run" in problem_of_loading(export)
    assert not (export.parent / "proof").exists()


def test_our_own_code_is_loaded_and_more_of_it_is_no_other(export: Path) -> None:
    """Claim: files without code, and links to files as a download cache has them, are no code."""
    (export / "notes.txt").write_text("import os")
    (export / "additional_chat_templates").mkdir()
    moved = export.parent / "blob"
    os.replace(export / "blocks.py", moved)
    (export / "blocks.py").symlink_to(moved)
    assert foreign_code(export) == ""
    assert problem_of_loading(export) == ""


@pytest.mark.parametrize("case", ["a package before a module", "a kernel from elsewhere"])
def test_verify_runs_nothing_of_the_directory(made: Path, export: Path, case: str) -> None:
    FOREIGN[case][0](export)
    lines = list(verify.compare(export, made / "checkpoint", read_manifest(made / "checkpoint")))
    assert "not compared" in lines[2] and "was not run" in lines[2]
    assert not (export.parent / "proof").exists()


def test_verify_imports_from_our_own_files(
    made: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: even code that nobody found would not come before ours."""
    package_before_module(export)
    monkeypatch.setattr(comparisons, "foreign_code", lambda _: "")
    lines = list(verify.compare(export, made / "checkpoint", read_manifest(made / "checkpoint")))
    assert lines[2].endswith("equal")
    assert not (export.parent / "proof").exists()
