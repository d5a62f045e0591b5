"""Loss and gradient norm of recorded states, without training: compares layouts, kernels and codes.

    torchrun ... -m megatron_opdlm.replay --student DIR --teacher DIR --trajectories FILE.jsonl \
        --out FILE.json [dotted.key=value ...]

A line of the input is ``{"prompt_ids": [...], "response_ids": [...], "masked": [0/1, ...]}``;
``masked`` is the noisy input as it is, blocks are counted from absolute position 0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm import launcher
from megatron_opdlm.config import Config, load_config, path_override
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_place


def read_states(path: Path, vocab_size: int, max_positions: int) -> list[dict[str, list[int]]]:
    """The checked rows of a trajectories file; InputError with the line of the first bad one."""
    rows = []
    for row in read_rows(path, "--trajectories"):
        where = row.place
        values: dict[str, Any] = {
            key: row.fields.get(key) for key in ("prompt_ids", "response_ids", "masked")
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
        rows.append(values)
    return rows


def _require_ids(where: str, key: str, value: Any, limit: int) -> None:
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} is missing or no list; give a list of integers")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < limit:
            raise InputError(f"{where}: {key} holds {item!r}; use integers from 0 to {limit - 1}")


def replay(config: Config, trajectories: Path) -> dict[str, Any]:
    """Loss of fixed states under ``config``'s loss and layout; the same on every rank."""
    from megatron_opdlm import parallel
    from megatron_opdlm.packing import pack_step
    from megatron_opdlm.planning.layout import model_layout
    from megatron_opdlm.run import build
    from megatron_opdlm.run.session import my_share, packing_of
    from megatron_opdlm.states import make_state
    from megatron_opdlm.teacher import score
    from megatron_opdlm.teacher_fp8 import quantize_fp8
    from megatron_opdlm.update import measure

    student_source, teacher_source = build.open_pair(config)
    shape = student_source.shape
    rows = read_states(trajectories, shape.vocab_size, shape.max_positions)
    hardware = parallel.init(
        model_layout(config),
        seed=config.train.seed,
        timeout_seconds=config.distributed.timeout_seconds,
    )
    student = build.build_student(student_source, config, hardware)
    teacher = build.choose_teacher(student, student_source, teacher_source, config, hardware)
    states = [
        make_state(
            number,
            row["prompt_ids"],
            row["response_ids"],
            [bool(m) for m in row["masked"]],
            student_source.vocabulary,
            exclude_eos=config.loss.exclude_eos,
        )
        for number, row in enumerate(rows)
    ]
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, compute, write ``--out`` whole or not at all."""
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--student", required=True, type=Path, help="HF directory or Megatron checkpoint"
    )
    parser.add_argument(
        "--teacher", required=True, type=Path, help="HF directory or Megatron checkpoint"
    )
    parser.add_argument("--trajectories", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--config", type=Path, help="YAML recipe whose model, loss and layout hold")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_args(arguments)
    paths = [
        path_override("model.path", options.student),
        path_override("teacher.path", options.teacher),
    ]
    config = load_config(options.config, [*options.overrides, *paths])
    if options.out.is_dir():
        raise InputError(f"--out={options.out} is a directory; name a file")
    check_place(options.out, f"--out={options.out}")
    result = replay(config, options.trajectories)
    if launcher.rank() == 0:
        from megatron_opdlm.model_files.writing import write_text

        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(result) + "\n")
        print(f"replay: loss {result['loss']:.6f}, grad norm {result['grad_norm']:.6f}")


if __name__ == "__main__":
    command(main)
