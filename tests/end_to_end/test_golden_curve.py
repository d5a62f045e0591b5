"""The loss curve of ``configs/tiny_cpu.yaml`` stays what it was recorded to be
(tests/golden/tiny_cpu.py records it anew)."""

from pathlib import Path

import pytest

from tests.golden.tiny_cpu import COMPUTED, COUNTED, STEPS, make_curve, read_curve

# Rounding: another packing, chunk and number of slots move these numbers by 1e-7 over the 64
# updates. The room above that is for other processors' sums and exponentials. A learning rate that
# is wrong by a thousandth moves the losses by 1e-2, and the tokens from the second step on.
TOLERANCE = 1e-4


def test_the_curve_is_the_recorded_one(tmp_path: Path):
    """Claim: every token and every loss of the recipe's first steps, 64 updates from fixed weights
    through a growing length and the warm-up's end, is the recorded one."""
    expected = read_curve()
    assert len(expected) == STEPS and expected[-1]["loss"] < 0.6 * expected[0]["loss"]
    found = make_curve(tmp_path)
    for ours, golden in zip(found, expected, strict=True):
        assert {key: ours[key] for key in COUNTED} == {key: golden[key] for key in COUNTED}
        for key in COMPUTED:
            assert ours[key] == pytest.approx(golden[key], rel=TOLERANCE), (ours["step"], key)
