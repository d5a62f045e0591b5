"""Decoding settings: what is allowed, and what the one-line errors say."""

import subprocess
import sys

import pytest

from megatron_opdlm.diffusion.decoding import REMASKING, Decoding
from megatron_opdlm.errors import InputError


def test_defaults_are_the_contracts_decoding_flags():
    """DESIGN 5: block 4, 4 steps, threshold 0.9, entropy bound 0.35, greedy, nothing cut off."""
    decoding = Decoding().validate()
    assert (decoding.mode, decoding.block_size, decoding.denoising_steps) == ("diffusion", 4, 4)
    assert (decoding.threshold, decoding.entropy_bound) == (0.9, 0.35)
    assert (decoding.temperature, decoding.top_p, decoding.top_k) == (0.0, 1.0, 0)


def test_remasking_names_are_those_of_the_decoding_rules():
    """The names written out here, without torch, are the names that denoising.py implements."""
    from megatron_opdlm.diffusion import denoising

    assert REMASKING == denoising.REMASKING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "diffuse"}, "mode=diffuse: .*use diffusion, ar .did you mean 'diffusion'"),
        ({"remasking": "random"}, "remasking=random: .*low_confidence_static"),
        ({"block_size": 0}, "block_size=0: .*1 or more"),
        ({"denoising_steps": 0}, "denoising_steps=0"),
        ({"threshold": 1.5}, "threshold=1.5: use a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"entropy_bound": -1.0}, "entropy_bound=-1.0: use a number from 0 up"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0: .*above 0"),
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
