"""Loss and gradient norm of recorded states: responses with the positions that are masked."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opdlm import parallel
from megatron_opdlm.config import Config
from megatron_opdlm.errors import InputError
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.records import State
from megatron_opdlm.run import build
from megatron_opdlm.run.session import my_share, packing_of
from megatron_opdlm.states import make_state
from megatron_opdlm.storage.model_source import ModelSource
from megatron_opdlm.teacher import score
from megatron_opdlm.teacher_fp8 import quantize_fp8
from megatron_opdlm.update import measure


def checked_state(
    where: str, fields: Mapping[str, Any], vocab_size: int, max_positions: int
) -> dict[str, list[int]]:
    """``prompt_ids`` [P], ``response_ids`` [R] and ``masked`` [R] (0 or 1) of a row; InputError,
    which begins with ``where``, for anything else.
    """
    values: dict[str, Any] = {
        key: fields.get(key) for key in ("prompt_ids", "response_ids", "masked")
    }
    for key, value in values.items():
        limit = 2 if key == "masked" else vocab_size
        _require_ids(where, key, value, limit)
    if not values["prompt_ids"]:
        raise InputError(f"{where}: prompt_ids is empty; the teacher needs at least one token")
    if len(values["masked"]) != len(values["response_ids"]):
        raise InputError(
            f"{where}: masked has {len(values['masked'])} entries for "
            f"{len(values['response_ids'])} response_ids; give one 0 or 1 a response token"
        )
    length = len(values["prompt_ids"]) + len(values["response_ids"])
    if length > max_positions:
        raise InputError(
            f"{where}: {length} tokens exceed the model's {max_positions} positions; shorten it"
        )
    return values


def _require_ids(where: str, key: str, value: Any, limit: int) -> None:
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} is missing or no list; give a list of integers")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < limit:
            raise InputError(f"{where}: {key} holds {item!r}; use integers from 0 to {limit - 1}")


def states_of(
    rows: Sequence[Mapping[str, Any]], config: Config, source: ModelSource
) -> list[State]:
    """Checked rows as states, numbered in their order."""
    return [
        make_state(
            number,
            row["prompt_ids"],
            row["response_ids"],
            [bool(m) for m in row["masked"]],
            source.vocabulary,
            exclude_eos=config.loss.exclude_eos,
        )
        for number, row in enumerate(rows)
    ]


def measure_states(
    config: Config,
    student_source: ModelSource,
    teacher_source: ModelSource,
    rows: Sequence[Mapping[str, list[int]]],
) -> dict[str, Any]:
    """Loss of checked rows under ``config``'s loss and layout; the same on every rank."""
    hardware = parallel.init(
        model_layout(config),
        seed=config.train.seed,
        timeout_seconds=config.distributed.timeout_seconds,
    )
    student = build.build_student(student_source, config, hardware)
    teacher = build.choose_teacher(student, student_source, teacher_source, config, hardware)
    states = states_of(rows, config, student_source)
    packing = packing_of(config, student_source, hardware)
    if config.teacher.quantization == "fp8":  # the rows are all the data that there is
        some = rows[: config.teacher.calibration_prompts]
        sequences = [row["prompt_ids"] + row["response_ids"] for row in some]
        quantize_fp8(teacher, sequences, packing)
    step = pack_step([my_share(states, student_source, teacher_source, packing)], packing)
    (batches,) = step.updates
    objective = build.build_objective(config, teacher)
    targets = score(teacher, step.finished, keep=objective.keep)
    report = measure(student, batches, targets, objective)
    order = [state.sample for batch in batches for state in batch.states]
    pairs = list(zip(order, report.sequence_loss, strict=True))
    by_sample = dict(parallel.gather_objects_over_data_parallel(pairs))
    losses = [by_sample[number] for number in range(len(states))]
    return {
        "loss": sum(losses) / len(losses),
        "per_sequence": losses,
        "grad_norm": report.grad_norm,
        "loss_tokens": sum(sum(state.counted) for state in states),
        "response_tokens": sum(len(state.response_ids) for state in states),
    }
