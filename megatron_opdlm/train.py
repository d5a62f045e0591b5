"""On-policy distillation, the loop: ``torchrun ... -m megatron_opdlm.train --config FILE
[dotted.key=value ...]``.

Read ``run`` first: one line per act of a step.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_opdlm import launcher
from megatron_opdlm.config import Config, load_config, require, stages_of
from megatron_opdlm.configuration import document
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.supervision import preemption


def run(config: Config) -> None:
    """Train to the end, from the start or from the newest checkpoint of ``train.out``."""
    from evaluation.in_training import read_evaluation
    from megatron_opdlm.run.interruption import saved_when_interrupted
    from megatron_opdlm.run.opening import open_session
    from megatron_opdlm.states import choose_states
    from megatron_opdlm.supervision.failures import failures_named
    from megatron_opdlm.update import update

    with failures_named():
        evaluation = read_evaluation(config)
        session = open_session(config)
        with saved_when_interrupted(session):
            evaluation.begin(session)
            for step in range(session.progress.step + 1, session.plan.total_steps + 1):
                watch, key = session.watch(step), (config.train.seed, step)
                with session.optimizer_away():
                    with watch.phase("rollout"):
                        rollout = session.rollout(step, key)
                    with watch.phase("states"):
                        sequences = session.sequences(step, rollout)
                        states = choose_states(sequences, key=key, **session.state_options)
                        batches = session.pack(states)
                    with watch.phase("teacher"):
                        targets = session.ask_teacher(batches)
                with watch.phase("update"):
                    reports = [
                        update(session.student, packed, targets, session.objective, rate)
                        for packed, rate in session.update_schedule(step, batches)
                    ]
                session.finish_step(step, rollout, states, batches, targets, reports, watch)
                evaluation.run(session)
                session.save_if_due()
        session.close()


def require_known_tasks(config: Config) -> None:
    """InputError for an evaluation task that does not exist. Its data may still be missing here."""
    from evaluation.tasks import get_task

    for name in config.evaluation.tasks:
        try:
            get_task(name)
        except InputError as error:
            raise InputError(f"evaluation.tasks: {error}") from None


def require_stage(file: Path | None, stage: str | None) -> None:
    """A recipe with stages is several runs: InputError where none that trains is chosen."""
    entries = stages_of(file) if file is not None else []
    training = [entry.name for entry in entries if entry.trains]
    if stage is not None and not entries:
        raise InputError(f"--stage {stage}: {file} has no stages; leave it out")
    if entries and stage not in training:
        which = "--stage is not given" if stage is None else f"--stage {stage}"
        raise InputError(
            f"{which}: {file} trains in the stages {', '.join(training)}; name one of them, or "
            "run all with launch/pipeline.sh"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, validate everything that needs no process group, train."""
    parser = Arguments(description="On-policy distillation.")
    parser.add_argument(
        "--config", type=Path, help="YAML recipe; defaults hold for what it leaves out"
    )
    parser.add_argument("--stage", metavar="NAME", help="one of the recipe's stages")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the layout and memory, train nothing",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        help="number of ranks that --dry-run assumes (default: WORLD_SIZE, else the fewest that "
        "the layout divides)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="override a key of the recipe"
    )
    parser.epilog = document.help_text(Config)
    options = parser.parse_intermixed_args(arguments)
    require_stage(options.config, options.stage)
    config = load_config(options.config, options.overrides, options.stage)
    require(config, "model.path", "data.path", "train.out")
    require_known_tasks(config)
    if options.dry_run:
        from megatron_opdlm.run.dry_run import describe, fewest_ranks

        if options.world_size is not None and options.world_size < 1:
            raise InputError(f"--world-size {options.world_size}: a number of ranks; use 1 or more")
        world_size = options.world_size or (
            launcher.world_size() if launcher.is_one_of_several() else fewest_ranks(config)
        )
        if launcher.rank() == 0:
            print(describe(config, world_size))
        return
    with preemption.listening():  # while the libraries are imported as well
        run(config)


if __name__ == "__main__":
    command(main)
