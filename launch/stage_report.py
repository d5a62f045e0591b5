"""Compares the stages of a pipeline: what each was trained on, and what it can do then."""

import json
from collections.abc import Sequence
from typing import Any

from evaluation.reporting.results import SUMMARY, decoding_label, read_summary
from launch.pipeline_parts import Answering, Part, Training, trainings
from megatron_opdlm.data.checks import MANIFEST
from megatron_opdlm.metrics import METRICS

_HEADER = (
    *("stage", "block", "loss", "steps", "trained tokens", "all so far", "last KL"),
    *("task", "decoding", "accuracy", "stderr", "tok/step"),
)


def compared(parts: Sequence[Part]) -> str:
    """Markdown: how the answers came about, and a row a training and evaluation."""
    lines = ["# Stages", ""]
    lines += [_answers(part) for part in parts if isinstance(part, Answering)]
    lines += ["", f"| {' | '.join(_HEADER)} |", "|" + "---|" * len(_HEADER)]
    so_far = 0
    for training in trainings(parts):
        last = _last_step(training)
        so_far += last["cumulative_trained_tokens"]
        config = training.config
        made = (
            training.name,
            config.rollout.block_size,
            config.loss.kind,
            last["step"],
            f"{last['cumulative_trained_tokens']:,}",
            f"{so_far:,}",
            f"{last['kl']:.3f}" if last.get("kl") is not None else "-",
        )
        for row in read_summary(training.results / SUMMARY):
            cells = (*made, row["task"], decoding_label(row["settings"]), *_measured(row))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [
            *lines,
            "",
            "`last KL`: nats per masked token of the last step, at that stage's own states, so not "
            "comparable where their kinds differ. `tok/step`: response tokens per denoising pass.",
            "",
        ]
    )


def _answers(part: Answering) -> str:
    path = part.answers.with_name(part.answers.name + MANIFEST)
    made = json.loads(path.read_text(encoding="utf-8"))
    left_out = ", ".join(f"{count} {why}" for why, count in made["left_out"].items())
    return (
        f"{part.name}: {made['rows']:,} answers with {made['response_tokens']:,} tokens (left out: "
        f"{left_out}) -> `{part.answers}`."
    )


def _last_step(training: Training) -> dict[str, Any]:
    lines = (training.run / METRICS).read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])


def _measured(row: dict[str, Any]) -> list[str]:
    forms = {"accuracy": ".4f", "stderr": ".4f", "tokens_per_denoising_step": ".2f"}
    return ["-" if row[key] is None else format(row[key], form) for key, form in forms.items()]
