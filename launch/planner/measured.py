"""What a run that has been made says about the rates: measured over computed seconds by phase."""

import json
from pathlib import Path
from statistics import median
from typing import Any

from launch.planner.estimate import Question, seconds_of_step
from launch.planner.layouts import with_rows
from launch.planner.sequence_work import Lengths
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.metrics import METRICS
from megatron_opdlm.model_files.manifest import CONFIG
from megatron_opdlm.planning.step_time import Machine
from megatron_opdlm.run.dry_run import open_or_public
from megatron_opdlm.run.expected_memory import split_of
from megatron_opdlm.run.provenance import read_starts

MEASURED = ("rollout", "teacher", "update")  # phases whose seconds a run writes


def corrections(run: Path, machine: Machine, hardware: Hardware, prompt: int) -> dict[str, float]:
    """By phase the median over the run's steps but the first, in which kernels are compiled.
    ``prompt``: mean tokens of a prompt. InputError where the run is of another GPU, or too short.
    """
    starts = read_starts(run)
    if not starts or not (run / METRICS).is_file():
        raise InputError(f"--measured {run} is no directory of a run; give its train.out")
    devices, kind = starts[-1]["devices"], machine.gpu.kind
    if not any(kind in device for device in devices):
        where = devices[0] if devices else "a CPU"
        raise InputError(f"--measured {run} ran on {where}, not on {kind}; give a run of that GPU")
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()][1:]
    if not rows:
        raise InputError(f"--measured {run} has less than two steps; give a longer run")
    config = with_rows(load_config(run / CONFIG, []), hardware)
    world = starts[-1]["world_size"]
    student, teacher, _ = open_or_public(config, world)
    question = Question(
        config=config,
        student=student,
        teacher=teacher,
        gpus=world,
        machine=machine,
        hardware=hardware,
        prompt=prompt,
        response=1,
        per_pass=1.0,
        steps=len(rows),
    )
    ratios = [_ratios(question, row) for row in rows]
    return {phase: median(ratio[phase] for ratio in ratios) for phase in MEASURED}


def _ratios(question: Question, row: dict[str, Any]) -> dict[str, float]:
    config = question.config
    split = split_of(config, question.gpus)
    memory = question.memory(config, split, question.machine.gpu.memory)
    lengths = Lengths(
        prompt=question.prompt,
        response=max(1, round(row["mean_response_tokens"])),
        longest=row["max_new_tokens"],
        per_pass=max(1.0, row["tokens_per_denoising_step"]),
    )
    computed = seconds_of_step(question, config, split, memory, lengths)
    return {phase: row[f"seconds_{phase}"] / computed[phase] for phase in MEASURED}
