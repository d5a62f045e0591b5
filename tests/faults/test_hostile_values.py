"""Whatever stands for a value: one ``error:`` line and code 2, or success; never a traceback."""

import argparse
import importlib
import random
from pathlib import Path

import pytest

from megatron_opdlm.config import Config, flatten, load_config, to_yaml
from megatron_opdlm.errors import Arguments
from tests.conftest import MASK, TinyModels
from tests.faults.refusals import COMMANDS, Runner

HOSTILE = [
    *("", " ", "null", "~", "~/x", "~nobody-here", "a/~/b", ".", "..", "/", "/proc/self/x", "--"),
    *("0", "-1", "1", "010", "1e3", "1e400", "nan", "-inf", "0x10", "12:30:45", "1_0", "½", "五"),
    *("9" * 30, "-" + "9" * 30, "9" * 5000, "2147483647", "1e-320", "0.1.2"),
    *("true", "off", "[]", "[a", "{}", "{a: b}", "[[1]]", "{a: {b: 1}}", "- a", "a: b", "&x", "*x"),
    *("!!python/object:os.system x", "@x", "`x`", "'", '"', "#x", "a #b", "${", "${train.seed}"),
    *(
        "${nowhere}",
        "${train.out}",
        "???",
        "%s",
        "{}{0}",
        "\0",
        "a\0b",
        "a\nb",
        "\ud800",
        "a" * 300,
    ),
    *("a/" * 3000, "x" * 100_000, "é\u202e\U0001f600", "low_confidence_static", "mixed", "GSM8K"),
]
DRAWS = 200  # over the three tests


@pytest.fixture(scope="module")
def model(models: TinyModels) -> Path:
    return models.hf("student", tied=True, layers=2)


def assert_said(outcome: tuple[int, str], what: object) -> None:
    """The contract's ends: done, or refused in one line."""
    code, stderr = outcome
    shown = f"{what!r:.200}: {stderr[-2000:]}"
    assert code in (0, 2) and "Traceback" not in stderr, shown
    if code:
        (line,) = stderr.strip().splitlines()
        assert line.startswith("error: ") and len(line) < 1000, shown


def test_configurations(tmp_path: Path):
    """Claim: a configuration is read or refused, and what is read comes back from its file."""
    file = tmp_path / "run.yaml"
    draw, keys = random.Random(3), list(flatten(Config()))
    for key, value in [(draw.choice(keys), draw.choice(HOSTILE)) for _ in range(DRAWS // 2)]:
        try:
            config = load_config(None, [f"{key}={value}"])
        except Exception as error:
            assert type(error).__name__ == "InputError", (key, value[:80], error)
            assert len(str(error)) < 1000, (key, value[:80])
            continue
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(file, []) == config, (key, value)


def test_dry_runs(runner: Runner, model: Path, tmp_path: Path):
    """Claim: the values that a key allows end a dry run well or in one line, too."""
    draw = random.Random(1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_ids": [1, 2]}\n')
    good = [f"model.path={model}", f"data.path={rows}", f"train.out={tmp_path}/out"]
    good += [f"model.mask_token_id={MASK}", "--dry-run"]
    keys = list(flatten(Config()))
    for _ in range(DRAWS // 4):
        override = f"{draw.choice(keys)}={draw.choice(HOSTILE)}"
        assert_said(runner("train", *good, override), override)
    for key in ("train.steps", "train.seed", "distributed.timeout_seconds"):
        assert_said(runner("train", *good, f"{key}=2147483647"), key)
    assert not (tmp_path / "out").exists() and not Path("~").exists()


def flags_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    """What the parser of a command takes, seen as it parses."""
    seen: list[argparse.Action] = []

    def parse(self: Arguments, *_: object, **__: object) -> None:
        seen.extend(self._actions)
        raise StopIteration

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(Arguments, method, parse)
    monkeypatch.setattr("sys.argv", [name])
    with pytest.raises(StopIteration):
        importlib.import_module(COMMANDS[name]).main()
    monkeypatch.undo()
    return [action for action in seen if action.option_strings and action.nargs != 0]


def test_every_flag_of_every_command(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Claim: a flag with any value, all others sensible but of a model that is not there."""
    draw = random.Random(2)
    nowhere = tmp_path / "nowhere"
    flags = {name: flags_of(name, monkeypatch) for name in COMMANDS}
    assert sum(map(len, flags.values())) > 100
    monkeypatch.chdir(tmp_path)  # away from the recipes: nothing is to be run
    for _ in range(DRAWS // 4):
        name = draw.choice([name for name in COMMANDS if flags[name]])
        chosen = draw.choice(flags[name])
        arguments = []
        for action in flags[name]:
            if action.required and action is not chosen:
                value = str(action.choices[0]) if action.choices else str(nowhere)
                arguments += [action.option_strings[-1], value]
        value = draw.choice(HOSTILE)
        arguments.append(f"{chosen.option_strings[-1]}={value}")
        assert_said(runner(name, *arguments), (name, arguments[-1][:120]))
    assert not Path("~").exists()
