"""Decoding settings: what is allowed, and what the one-line errors say."""

import subprocess
import sys
from typing import get_args

import pytest

from evaluation.decoding_flags import add_decoding_flags
from megatron_opdlm.config import EvaluationConfig, RolloutConfig, load_config
from megatron_opdlm.diffusion.decoding import ASKED, Decoding, Remasking
from megatron_opdlm.errors import Arguments, InputError
from megatron_opdlm.keys import keys_of


def test_defaults_are_the_contracts_decoding_flags():
    """DESIGN 5: block 4, 4 steps, threshold 0.9, entropy bound 0.35, greedy, nothing cut off."""
    decoding = Decoding().validate()
    assert (decoding.mode, decoding.block_size, decoding.denoising_steps) == ("diffusion", 4, 4)
    assert (decoding.threshold, decoding.entropy_bound) == (0.9, 0.35)
    assert (decoding.temperature, decoding.top_p, decoding.top_k) == (0.0, 1.0, 0)


def test_remasking_names_are_those_of_the_decoding_rules():
    """The names written out here, without torch, are the names that denoising.py implements."""
    from megatron_opdlm.diffusion import denoising

    assert get_args(Remasking) == denoising.REMASKING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mode": "diffuse"},
            "mode=diffuse must be one of diffusion, ar .did you mean",
        ),
        ({"remasking": "random"}, "remasking=random must be one of low_confidence_static"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"denoising_steps": 0}, "denoising_steps=0"),
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \[0, 1\]"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"entropy_bound": -1.0}, "entropy_bound=-1.0 must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_values_name_value_rule_and_remedy(changes, message):
    """Every bad value is an InputError of one line that starts with the value."""
    with pytest.raises(InputError, match=message) as caught:
        Decoding(**changes).validate()
    assert "\n" not in str(caught.value)


def test_importing_the_settings_does_not_import_torch():
    """Flags are checked before the seconds that torch takes to import."""
    code = "import sys, megatron_opdlm.diffusion.decoding; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sections_and_flags_say_what_the_record_says():
    """Claim: one fact, one place: a section that generates and the flag of a field have the range
    and the unit of the field of the same name; ``of`` hands a section's values over."""
    config = load_config(None, ["rollout.top_k=7", "evaluation.threshold=0.5"])
    for section in (RolloutConfig, EvaluationConfig):
        shared = set(keys_of(section)) & set(keys_of(Decoding))
        assert shared >= {"remasking", "threshold", "top_p", "max_new_tokens", "denoising_steps"}
        for name in shared:
            found, expected = keys_of(section)[name], keys_of(Decoding)[name]
            assert (found.range, found.unit) == (expected.range, expected.unit), name
    assert Decoding.of(config.rollout, seed=3).top_k == 7
    drawn = Decoding.of(config.evaluation, denoising_steps=2)
    assert (drawn.threshold, drawn.denoising_steps, drawn.temperature) == (0.5, 2, 0.0)
    parser = Arguments(None)
    add_decoding_flags(parser)
    flags = parser.parse_args([])
    assert {name: getattr(flags, name) for name in ASKED} == Decoding().asked
