"""What the documentation says of the configuration is what stands at its keys."""

import dataclasses
from pathlib import Path

import pytest

from megatron_opdlm import train
from megatron_opdlm.config import Config, flatten, may_change
from megatron_opdlm.configuration import document
from megatron_opdlm.keys import keys_of

REPOSITORY = Path(__file__).parents[3]


def test_the_page_is_what_the_command_makes():
    """Claim: docs/configuration.md and the keys agree, word for word."""
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert page == document.markdown(Config), (
        "run: python -m megatron_opdlm.config > docs/configuration.md"
    )


def test_every_key_has_a_row_with_default_unit_range_and_resume_behaviour():
    rows = [line.split(" | ") for line in document.markdown(Config).splitlines()]
    found = {row[0].strip("| `"): row for row in rows if row[0].startswith("| `")}
    assert list(found) == list(flatten(Config()))
    assert all(row[-1].strip(" |") for row in found.values())
    key = "update.tokens_per_microbatch"
    assert found[key][1:5] == ["`0`", "tokens", "whole number, at least 0", "may change"]
    assert found["optimizer.beta1"][1:5] == ["`0.9`", "", "number, in [0, 1)", ""]
    assert found["train.steps"][3].endswith("at least 1, or -1 for all epochs of the data")
    assert {key for key, row in found.items() if row[4]} == {k for k in found if may_change(k)}


def test_help_has_every_key(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert not [key for key in flatten(Config()) if f"  {key}=" not in shown]
    assert "length of the linear ramp from 0 (steps; whole number, at least 0)" in shown


def test_defaults_keep_their_own_ranges():
    config = Config()
    for section in dataclasses.fields(Config):
        values = getattr(config, section.name)
        for name, knowledge in keys_of(type(values)).items():
            value = getattr(values, name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert knowledge.allows(value), f"{section.name}.{name}"
