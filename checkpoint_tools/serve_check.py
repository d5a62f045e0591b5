"""Checks a Hugging Face directory against what serving engines demand. Not there yet."""

from pathlib import Path

from megatron_opdlm.errors import Arguments, InputError, command


def main() -> None:
    """Say in one line that the checks are not there yet."""
    parser = Arguments(prog="python -m checkpoint_tools.serve_check", description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="exported Hugging Face directory")
    parser.parse_args()
    raise InputError("serve_check is not there yet; check an export with checkpoint_tools.verify")


if __name__ == "__main__":
    command(main)
