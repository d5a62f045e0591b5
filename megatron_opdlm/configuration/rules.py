"""Agreement between a configuration's keys; what one key alone must be stands at the key.

Works on the flat form ``{"section.key": value}`` whose values are already right by themselves.
Every message has both values, the rule and the remedy.
"""

from collections.abc import Mapping
from typing import Any

from megatron_opdlm.errors import InputError, nearest

Values = Mapping[str, Any]


def check(values: Values) -> None:
    """Raise ``InputError`` for the first rule that is broken."""
    _check_layout(values)
    _check_lora(values)
    _check_offload(values)
    _check_decoding(values)
    _check_loss(values)
    _check_schedules(values)
    _check_mixing(values)
    _check_evaluation(values)
    _check_profile(values)


def _check_layout(values: Values) -> None:
    if values["model.sequence_parallel"] and values["model.tensor_parallel"] == 1:
        raise InputError(
            "model.sequence_parallel=true shards over the tensor-parallel ranks, but "
            "model.tensor_parallel=1; use more ranks or model.sequence_parallel=false"
        )


def _check_offload(values: Values) -> None:
    if values["teacher.offload_weights"] and values["teacher.quantization"] != "none":
        raise InputError(
            f"teacher.offload_weights=true cannot move the packed weights of "
            f"teacher.quantization={values['teacher.quantization']}; use one of the two"
        )


def _check_lora(values: Values) -> None:
    targets = values["lora.targets"]
    if values["lora.rank"] and (not targets or len(set(targets)) < len(targets)):
        raise InputError(
            f"lora.targets={targets} must name each linear once, and at least one, with "
            f"lora.rank={values['lora.rank']}; use lora.rank=0 to train all weights"
        )


def _check_decoding(values: Values) -> None:
    positions, prompt = values["model.max_positions"], values["data.max_prompt_tokens"]
    if positions is not None and prompt is not None and prompt >= positions:
        raise InputError(
            f"data.max_prompt_tokens={prompt} leaves no room for a response within "
            f"model.max_positions={positions}; use less than {positions}"
        )


def _check_loss(values: Values) -> None:
    kind, weight, alpha = (values[f"loss.{key}"] for key in ("kind", "reverse_weight", "jsd_alpha"))
    if weight > 0 and kind != "mixed":
        raise InputError(
            f"loss.reverse_weight={weight} has no effect with loss.kind={kind}; "
            "use loss.kind=mixed, or loss.reverse_weight=0"
        )
    if kind == "jsd" and alpha in (0, 1):
        raise InputError(
            f"loss.jsd_alpha={alpha} makes every Jensen-Shannon divergence 0; use a number between "
            "0 and 1, or loss.kind=forward_kl or reverse_kl for its limits"
        )
    if kind == "nll":
        for key, plain in (
            ("loss.top_k", 0),
            ("teacher.temperature", 1),
            ("teacher.top_p", 1),
            ("teacher.quantization", "none"),
            ("teacher.targets", "hidden"),
        ):
            if values[key] != plain:
                raise InputError(
                    f"{key}={values[key]} has no effect with loss.kind=nll, which asks no teacher; "
                    f"use {key}={plain}"
                )
    if values["teacher.targets"] == "top_k" and values["loss.top_k"] == 0:
        raise InputError(
            "teacher.targets=top_k keeps loss.top_k entries of a distribution and loss.top_k=0 is "
            "the full vocabulary; set loss.top_k, or use teacher.targets=hidden"
        )
    if values["loss.top_k_tail"] != "drop" and values["loss.top_k"] == 0:
        raise InputError(
            f"loss.top_k_tail={values['loss.top_k_tail']} has no effect with loss.top_k=0 (the "
            "full vocabulary); set loss.top_k, or use loss.top_k_tail=drop"
        )
    if values["teacher.top_p"] < 1 and (kind == "reverse_kl" or weight > 0):
        raise InputError(
            f"teacher.top_p={values['teacher.top_p']} takes tokens from the teacher, where "
            f"loss.kind={kind} is infinite; use teacher.top_p=1, or loss.kind=forward_kl or jsd"
        )


def _check_schedules(values: Values) -> None:
    _ordered(values, "optimizer.min_lr", "optimizer.lr")
    if values["curriculum.kind"] != "constant":
        _ordered(values, "curriculum.start", "curriculum.end")
    if values["threshold_schedule.enabled"]:
        _check_threshold_schedule(values)


def _check_mixing(values: Values) -> None:
    first, last = values["mixing.fraction"], values["mixing.end_fraction"]
    constant = values["mixing.kind"] == "constant"
    if constant and last not in (0, first):
        raise InputError(
            f"mixing.end_fraction={last} has no effect with mixing.kind=constant; "
            "use linear, sin or cos, or mixing.end_fraction=0"
        )
    if values["mixing.path"] and first == last == 0:
        raise InputError(
            f"mixing.path={values['mixing.path']} has no effect with mixing.fraction=0; "
            "use a fraction above 0, or mixing.path="
        )


def _ordered(values: Values, low: str, high: str) -> None:
    if values[low] > values[high]:
        raise InputError(
            f"{low}={values[low]} exceeds {high}={values[high]}; "
            f"use at most {values[high]}, or raise {high}"
        )


def _check_threshold_schedule(values: Values) -> None:
    remasking = values["rollout.remasking"]
    if remasking != "low_confidence_dynamic":
        raise InputError(
            f"threshold_schedule.enabled=true has no effect with rollout.remasking={remasking}; "
            "use low_confidence_dynamic, or threshold_schedule.enabled=false"
        )
    steps, hold = values["train.steps"], values["threshold_schedule.hold_steps"]
    if values["threshold_schedule.steps"] == -1 and steps != -1 and hold >= steps:
        raise InputError(
            f"threshold_schedule.hold_steps={hold} leaves no step of train.steps={steps} for the "
            f"ramp; use less than {steps}, or set threshold_schedule.steps"
        )


def _check_evaluation(values: Values) -> None:
    every, tasks, best = (values[f"evaluation.{key}"] for key in ("every", "tasks", "best_by"))
    if every and not tasks:
        raise InputError(
            f"evaluation.every={every} evaluates nothing with evaluation.tasks=[]; name tasks, or "
            "use evaluation.every=0"
        )
    if tasks and not values["evaluation.data"]:
        raise InputError(f"evaluation.tasks={tasks} need their data files; set evaluation.data=DIR")
    if best and best not in tasks:
        raise InputError(
            f"evaluation.best_by={best} is none of evaluation.tasks={tasks}; use one of them, or "
            "evaluation.best_by= for the mean over all" + nearest(best, tasks)
        )


def _check_profile(values: Values) -> None:
    steps = values["profile.steps"]
    if steps and (len(steps) != 2 or steps[0] > steps[1]):
        raise InputError(
            f"profile.steps={steps} must be the first and the last step of one profile; use "
            "[FIRST,LAST], or [] for none"
        )
