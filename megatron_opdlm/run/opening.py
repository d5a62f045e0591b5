"""Opens a run: checks everything, then builds everything, and says what is about to happen."""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_opdlm import launcher, parallel
from megatron_opdlm.checkpoint import Checkpoints, Progress
from megatron_opdlm.config import Config, flatten
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.metrics import MetricsWriter
from megatron_opdlm.offload import HOST, move_layers
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.reporting.profiling import Profiler
from megatron_opdlm.reporting.trackers import TrackedRun, Tracker, open_trackers
from megatron_opdlm.run.build import (
    build_checkpoints,
    build_objective,
    build_plan,
    build_student,
    choose_teacher,
    describe_decoding,
    describe_kernels,
    open_pair,
)
from megatron_opdlm.run.exports import EXPORTS, Exports
from megatron_opdlm.run.provenance import record_start
from megatron_opdlm.run.run_directory import check_run_directory, prepare_run_directory
from megatron_opdlm.run.run_lock import hold_run_directory
from megatron_opdlm.run.session import Session, packing_of
from megatron_opdlm.step_plan import StepPlan
from megatron_opdlm.storage.run_state import RunIdentity
from megatron_opdlm.supervision import preemption, watchdog
from megatron_opdlm.supervision.blame import calls_made
from megatron_opdlm.teacher_fp8 import calibration_sequences, quantize_fp8


def open_session(config: Config) -> Session:
    """Check everything, then build everything; continues from the newest checkpoint where there is
    one.
    """
    check_run_directory(config)
    source, teacher_source = open_pair(config)
    plan = build_plan(config, source)
    timeout_seconds = config.distributed.timeout_seconds
    hardware = parallel.init(
        model_layout(config), seed=config.train.seed, timeout_seconds=timeout_seconds
    )
    on_cpu = hardware.device.type == "cpu"  # where gloo's calls are waited for in Python
    calls = None if on_cpu else calls_made
    profiler = Profiler(config, hardware, parallel.rank())
    watchdog.start(timeout_seconds, parallel.broadcast_object, calls)
    preemption.stop_at_once()
    hold_run_directory(Path(config.train.out))
    checkpoints = build_checkpoints(config, source, hardware)
    checkpoints.identity = RunIdentity.of(plan.prompts.prompts, config.train.seed)
    latest = checkpoints.latest()
    student = build_student(source, config, hardware, load=latest is None)
    progress = Progress() if latest is None else checkpoints.restore(student, latest)
    teacher = None
    if config.loss.kind != "nll":
        teacher = choose_teacher(student, source, teacher_source, config, hardware)
        if config.teacher.quantization == "fp8":
            count = config.teacher.calibration_prompts
            sequences = calibration_sequences(plan.prompts.prompts, count, plan.max_positions)
            quantize_fp8(teacher, sequences, packing_of(config, source, hardware))
    trackers: Sequence[Tracker] = ()
    hold_run_directory(Path(config.train.out), create=True)
    if parallel.is_writer():
        prepare_run_directory(config)
        checkpoints.places.discard_leftovers()
        decoding = describe_decoding(config, source.shape, hardware)
        _announce(config, hardware, decoding, plan, progress)
        trackers = _open_trackers(config, checkpoints, progress)
    parallel.barrier()
    metrics = MetricsWriter(
        Path(config.train.out),
        enabled=parallel.is_writer(),
        total_steps=plan.total_steps,
        start_step=progress.step,
        trackers=trackers,
    )
    exports = Exports(
        directory=Path(config.train.out) / EXPORTS,
        formats=config.checkpoint.export,
        checkpoints=checkpoints,
        say=metrics.say_once,
    )
    if parallel.is_writer():
        exports.begin()
    session = Session(
        config=config,
        hardware=hardware,
        source=source,
        plan=plan,
        student=student,
        teacher=teacher,
        teacher_source=teacher_source,
        objective=build_objective(config, teacher),
        checkpoints=checkpoints,
        exports=exports,
        metrics=metrics,
        progress=progress,
        profiler=profiler,
        saved_step=progress.step,
    )
    if teacher is not None and session.teacher_waits:
        move_layers(teacher, HOST)
    return session


def _announce(
    config: Config, hardware: Hardware, decoding: str, plan: StepPlan, progress: Progress
) -> None:
    """What is about to happen: on stderr beside the progress bar, and into the run's record."""
    record_start(
        Path(config.train.out),
        hardware=hardware.reason,
        devices=hardware.devices,
        world_size=launcher.world_size(),
    )
    layout = model_layout(config)
    lines = [
        f"hardware: {hardware.reason}",
        describe_kernels(config, hardware),
        decoding,
        f"layout: tensor {layout.tensor} x pipeline {layout.pipeline} x context "
        f"{layout.context} x data {parallel.data_parallel_size()}"
        + (f", experts over {layout.expert}" if layout.expert > 1 else "")
        + (", sequence parallel" if layout.sequence_parallel else ""),
        f"prompts: {plan.prompts.summary}",
        f"steps: {plan.steps_told}"
        + (f", resuming after step {progress.step}" if progress.step else ""),
        *plan.notes,
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _open_trackers(
    config: Config, checkpoints: Checkpoints, progress: Progress
) -> Sequence[Tracker]:
    """The run's pages in experiment trackers; the id of one that has any travels with the
    checkpoints.
    """
    trackers = open_trackers(
        TrackedRun(
            directory=Path(config.train.out),
            start_step=progress.step,
            logging=config.logging,
            settings=flatten(config),
            run_id=checkpoints.tracker_run_id,
        )
    )
    known = (tracker.run_id for tracker in trackers)
    checkpoints.tracker_run_id = next(filter(None, known), checkpoints.tracker_run_id)
    return trackers
