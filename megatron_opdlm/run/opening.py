"""Opens a run: checks everything, then builds everything, and says what is about to happen."""

import sys
from pathlib import Path

from megatron_opdlm import launcher, parallel
from megatron_opdlm.checkpoint import Checkpoints, Progress
from megatron_opdlm.config import Config, flatten
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.metrics import MetricsWriter
from megatron_opdlm.offload import HOST, move_layers
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.reporting.profiling import Profiler
from megatron_opdlm.reporting.tracking import Tracker, open_tracker
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
    tracker = None
    hold_run_directory(Path(config.train.out), create=True)
    if parallel.is_writer():
        prepare_run_directory(config)
        checkpoints.places.discard_leftovers()
        decoding = describe_decoding(config, source.shape, hardware)
        _announce(config, hardware, decoding, plan, progress)
        tracker = _open_tracker(config, checkpoints)
    parallel.barrier()
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
        metrics=MetricsWriter(
            Path(config.train.out),
            enabled=parallel.is_writer(),
            tensorboard=config.logging.tensorboard,
            total_steps=plan.total_steps,
            start_step=progress.step,
            tracker=tracker,
        ),
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


def _open_tracker(config: Config, checkpoints: Checkpoints) -> Tracker | None:
    """The run's page in an experiment tracker; its id travels with the checkpoints."""
    tracker = open_tracker(
        Path(config.train.out),
        mode=config.logging.wandb,
        project=config.logging.wandb_project,
        settings=flatten(config),
        run_id=checkpoints.tracker_run_id,
    )
    if tracker is not None:
        checkpoints.tracker_run_id = tracker.run_id
    return tracker
