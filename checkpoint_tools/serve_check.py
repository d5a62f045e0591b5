"""Checks a Hugging Face directory against what SGLang, LMDeploy and transformers demand.

Prints one line a check, ``engine | check | ok or breaks: why | remedy``; exit code 1 when something
would break. SGLang and LMDeploy are not started: their demands are checked on the files.
transformers really loads the model and decodes a block, if the code is what this version exports;
other code is not run. With --checkpoint the weights, logits and greedy tokens are compared, too.
"""

from collections.abc import Iterator
from pathlib import Path

from checkpoint_tools.engines.demands import (
    EXPORT_AGAIN,
    TRANSFORMERS,
    Directory,
    Finding,
    demands,
    read_directory,
)
from megatron_opdlm.errors import Arguments, RunError, command


def main() -> None:
    """Print the table; exit code 1 when it has findings."""
    parser = Arguments(description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="exported Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, help="compare with this Megatron checkpoint")
    parser.add_argument("--no-load", action="store_true", help="check the files only")
    arguments = parser.parse_args()
    directory = read_directory(arguments.hf)
    print("engine | check | state | remedy")
    findings = []
    for finding in check(directory, load=not arguments.no_load, checkpoint=arguments.checkpoint):
        print(finding, flush=True)
        findings.append(finding)
    broken = [finding for finding in findings if finding.problem]
    if broken:
        engines = ", ".join(dict.fromkeys(finding.engine for finding in broken))
        raise RunError(
            f"{arguments.hf}: {len(broken)} of {len(findings)} checks break ({engines}); the table "
            "says where, why and what to do"
        )


def check(
    directory: Directory, *, load: bool = True, checkpoint: Path | None = None
) -> Iterator[Finding]:
    """Every finding, in the order of the checklist."""
    findings = list(demands(directory))
    yield from findings
    if load and not any(f.problem for f in findings if f.engine == TRANSFORMERS):
        yield _loading(directory)
    if checkpoint is not None:
        yield _parity(directory, checkpoint)


def _loading(directory: Directory) -> Finding:
    from checkpoint_tools.engines.load import problem_of_loading

    problem = problem_of_loading(directory.path)
    return Finding(
        engine=TRANSFORMERS,
        check="loading",
        problem=problem,
        remedy=EXPORT_AGAIN,
        note="loaded, a block decoded",
    )


def _parity(directory: Directory, checkpoint: Path) -> Finding:
    """Checks 9 and 10 of the list: logits and greedy tokens."""
    from checkpoint_tools.verify import compare
    from megatron_opdlm.model_files.manifest import read_manifest

    try:
        lines = list(compare(directory.path, checkpoint, read_manifest(checkpoint), quiet=False))
        problem = ""
    except RunError as error:
        lines, problem = [], str(error)
    return Finding(
        engine=TRANSFORMERS,
        check="parity",
        problem=problem,
        remedy=EXPORT_AGAIN,
        note="; ".join(lines),
    )


if __name__ == "__main__":
    command(main)
