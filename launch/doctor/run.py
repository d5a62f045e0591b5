"""Is this machine, with this configuration, ready for a run?

    opdlm doctor [--config FILE] [--self-test] [dotted.key=value ...]
    torchrun ... --no-python opdlm doctor ...

One line a finding: ok, note (the run goes on, with what the line says) or breaks, with the remedy.
Started by torchrun, the ranks are those of the run, on all its machines; started alone, ranks are
started here: one a GPU, two on a CPU. Exit code 1 where something breaks. docs/doctor.md
"""

from collections.abc import Iterator
from pathlib import Path

from launch.doctor import inputs, machine, ranks
from launch.doctor.finding import Finding
from launch.doctor.self_test import self_test
from megatron_opdlm import launcher
from megatron_opdlm.config import Config, load_config
from megatron_opdlm.errors import Arguments, InputError, RunError, command


def findings(config: Config, world: int | None, *, test: bool) -> Iterator[Finding]:
    """Examine everything. Every rank of a launcher calls it; the first one has all findings."""
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.run.dry_run import fewest_ranks

    hardware = select_hardware()
    place = machine.existing(Path(config.train.out or "."))
    meeting = ranks.meet(hardware, place) if launcher.is_one_of_several() else None
    if launcher.rank() > 0:
        return
    here = len(hardware.devices)
    if world is None:
        world = meeting.world if meeting else here or fewest_ranks(config)
    yield from _examined("versions", machine.versions())
    yield from _examined("GPUs", machine.accelerators(hardware))
    yield from _examined("kernels", machine.kernels(config, hardware))
    if meeting is None:
        yield from _examined("ranks", _met_here(here or 2, place))
    else:
        yield from ranks.findings(meeting, place)
    yield from _examined("shared memory", machine.shared_memory())
    found = inputs.Models()
    yield from _examined("models", inputs.models(config, world, found))
    yield from _examined("disk", machine.disk(config, found.checkpoint_bytes))
    yield from _examined("data.path", inputs.data(config, found))
    yield from _examined("evaluation", inputs.benchmarks(config))
    yield from _examined("sandbox", inputs.sandbox())
    if test:
        yield from _examined("self-test", self_test(here or 2))


def _met_here(count: int, place: Path) -> Iterator[Finding]:
    yield from ranks.findings(ranks.start_and_meet(count, place), place)


def _examined(name: str, found: Iterator[Finding]) -> Iterator[Finding]:
    """What was found; an examination that ends with an error is a finding, too."""
    try:
        yield from found
    except (InputError, RunError) as error:  # have their remedy
        yield Finding(name=name, text=str(error), breaks=True)
    except Exception as error:  # a broken library is what the doctor is asked about
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Finding(name=name, text=text, remedy="repair or remove what fails", breaks=True)


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe; without, the defaults")
    parser.add_argument(
        "--world-size",
        type=int,
        help="ranks of the run (default: the ranks that were started, else the GPUs here, else the "
        "fewest that the layout divides)",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="train a tiny model for two steps on this machine, too (about a minute)",
    )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    args = parser.parse_intermixed_args()
    if args.world_size is not None and args.world_size < 1:
        raise InputError(f"--world-size {args.world_size}: a number of ranks; use 1 or more")
    if args.self_test and launcher.is_one_of_several():
        raise InputError("--self-test starts ranks of its own; ask for it without torchrun")
    config = load_config(args.config, args.overrides)
    all_found = []
    for finding in findings(config, args.world_size, test=args.self_test):
        print(finding, flush=True)
        all_found.append(finding)
    if breaking := [finding for finding in all_found if finding.breaks]:
        names = ", ".join(dict.fromkeys(finding.name for finding in breaking))
        raise RunError(f"a run would not work here: {names}; see the lines that begin with breaks")


if __name__ == "__main__":
    command(main)
