"""``--sandbox``: what to do where generated programs cannot be confined."""

import argparse

from megatron_opdlm import keys
from megatron_opdlm.configuration.learning import EvaluationConfig


def add_sandbox_flag(parser: argparse.ArgumentParser) -> None:
    """Add the key ``evaluation.sandbox`` as a flag, for ``evaluation.jail.sandbox.use_sandbox``."""
    parser.add_argument(
        "--sandbox",
        choices=keys.choices(keys.types_of(EvaluationConfig)["sandbox"]),
        default=EvaluationConfig().sandbox,
        help=keys.described(EvaluationConfig, "sandbox"),
    )
