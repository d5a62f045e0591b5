"""A plan as text for people and as an object for programs."""

from collections.abc import Sequence
from typing import Any

from launch.planner.estimate import Question, Totals
from launch.planner.layouts import GIB, Planned, Refused, name_of, usable, why_not
from megatron_opdlm.planning.phase_memory import PHASES
from megatron_opdlm.planning.step_time import PHASES as TIMED
from megatron_opdlm.planning.step_time import total
from megatron_opdlm.run.expected_memory import most_of_a_step

WAYS_OUT = (
    "more --gpus, 16-bit moments (optimizer.exp_avg_dtype=bf16 optimizer.exp_avg_sq_dtype=bf16) or "
    "low-rank terms (lora.rank=16) take less of a rank"
)

RECOMPUTED = {
    "false": "",
    "attention": ", attention recomputed",
    "mlp": ", MLP recomputed",
    "true": ", recomputed",
}


def layout_of(planned: Planned) -> str:
    config, split = planned.config, planned.split
    name = name_of(split, sequence_parallel=config.model.sequence_parallel)
    again = RECOMPUTED[config.model.recompute]
    return (
        f"{name}, rows of {config.update.tokens_per_microbatch:,} tokens{again}, "
        f"{min(config.rollout.slots, _each(planned))} slots"
    )


def _each(planned: Planned) -> int:
    """Sequences of a step that one copy of the model generates."""
    rollout, split = planned.config.rollout, planned.split
    sequences = rollout.prompts_per_step * rollout.responses_per_prompt
    return -(-sequences // (split.data * split.context))


def keys_of(planned: Planned) -> str:
    """As they are typed."""
    shown = {True: "true", False: "false"}
    return " ".join(f"{key}={shown.get(value, value)}" for key, value in planned.keys.items())  # pyright: ignore[reportArgumentType, reportCallIssue]


def assumptions(question: Question) -> list[str]:
    """What the numbers rest on."""
    machine, shape = question.machine, question.student.shape
    gpu, share = machine.gpu, machine.efficiency
    load = most_of_a_step(question.config, shape)
    rates = (
        f"{gpu.name} by its datasheet: {gpu.flops / 1e12:,.0f} TFLOP/s, memory "
        f"{gpu.bandwidth / 1e9:,.0f} GB/s, {gpu.link / 1e9:,.0f} GB/s to its neighbours, "
        f"{gpu.network / 1e9:,.1f} to other machines"
    )
    taken = (
        f"reached of it, assumed: {share.update:.0%} of the operations in the update, "
        f"{share.teacher:.0%} in the teacher, {share.rollout:.0%} in the rollout, "
        f"{share.bandwidth:.0%} of the memory's rate, {share.link:.0%} of the links'"
    )
    measured = [
        f"{phase}: {times:.2f} times that, as measured"
        for phase, times in question.corrections.items()
    ]
    return [
        f"rates        {rates}",
        f"             {taken}",
        "             " + ("; ".join(measured) or "nothing of this was measured on a GPU"),
        f"lengths      responses {question.response:,} tokens in the mean, at most "
        f"{load.response:,}; prompts {question.prompt:,}, at most {load.prompt:,}; "
        f"{question.per_pass:g} tokens a pass",
        "             time is that of the mean, memory that of the longest",
    ]


def memory_table(planned: Planned, room: float) -> list[str]:
    """Parts by phase, GiB."""
    memory = planned.memory
    sizes = {phase: memory.sizes(phase) for phase in PHASES}
    parts = list(dict.fromkeys(part for of_phase in sizes.values() for part in of_phase))
    rows = [
        f"  {part:<36}" + "".join(f"{sizes[phase].get(part, 0.0) / GIB:>10.2f}" for phase in PHASES)
        for part in parts
    ]
    return [
        f"  {'memory of the fullest rank, GiB':<36}" + "".join(f"{phase:>10}" for phase in PHASES),
        *rows,
        f"  {f'peak, of {room / GIB:.1f} that may be filled':<36}"
        + "".join(f"{memory.peak(phase) / GIB:>10.2f}" for phase in PHASES),
    ]


def seconds_line(planned: Planned) -> str:
    shown = ", ".join(f"{phase} {planned.seconds[phase]:.1f}" for phase in TIMED)
    return f"{total(planned.seconds):.1f} seconds a step at full length: {shown}"


def totals_line(question: Question, totals: Totals) -> str:
    return (
        f"{question.steps} steps: {totals.hours:.1f} hours, {totals.gpu_hours:.0f} GPU-hours; "
        f"{totals.rollout_tokens / 1e6:.1f} M tokens generated, "
        f"{totals.trained_tokens / 1e6:.1f} M trained on; {totals.flops_paper:.2e} FLOPs as the "
        f"paper counts, {totals.flops:.2e} in full"
    )


def _own(question: Question, own: tuple[Planned, Totals] | Refused) -> list[str]:
    """The recipe's layout."""
    if isinstance(own, Refused):
        return [f"as the recipe says: {own.name}", f"  does not fit: {own.reason}"]
    planned, whole = own
    reason = why_not(question, planned)
    times = [f"  {seconds_line(planned)}", f"  {totals_line(question, whole)}"]
    return [
        f"as the recipe says: {layout_of(planned)}",
        f"  {'does not fit: ' + reason if reason else 'fits'}",
        *memory_table(planned, usable(question)),
        *([] if reason else times),
    ]


def text(
    question: Question,
    notes: Sequence[str],
    own: tuple[Planned, Totals] | Refused,
    found: Sequence[tuple[Planned, Totals]],
    refused: Sequence[Refused],
    left_out: int,
) -> str:
    lines = [
        f"plan         {question.student.directory} on {question.gpus} x "
        f"{question.machine.gpu.name}; evaluations, compilation and restarts come on top",
        *notes,
        *assumptions(question),
        "",
        *_own(question, own),
        "",
        "layouts that fit, the fastest first:" if found else "no layout fits:",
    ]
    for number, (one, sums) in enumerate(found, start=1):
        peak = one.memory.peak(one.memory.fullest) / GIB
        lines += [
            f"  {number}. {layout_of(one)}",
            f"     {sums.hours:.1f} hours, {sums.gpu_hours:.0f} GPU-hours; {seconds_line(one)}; "
            f"{peak:.1f} GiB in the {one.memory.fullest}",
            f"     {keys_of(one) or 'as the recipe says'}",
        ]
    if left_out:
        lines.append(f"  and {left_out} more that are slower (--top shows them)")
    if not found:
        lines.append(f"  {WAYS_OUT}")
    if refused:
        lines += [
            "",
            "refused, filled in the way that takes least:",
            *(f"  {one.name}: {one.reason}" for one in refused),
        ]
    return "\n".join(lines)


def record(
    question: Question,
    notes: Sequence[str],
    own: tuple[Planned, Totals] | Refused,
    found: Sequence[tuple[Planned, Totals]],
    refused: Sequence[Refused],
) -> dict[str, Any]:
    """The same for programs; bytes, seconds, tokens."""
    gpu, share = question.machine.gpu, question.machine.efficiency
    return {
        "model": str(question.student.directory),
        "gpus": question.gpus,
        "gpu": vars(gpu),
        "efficiency_assumed": vars(share),
        "measured_over_computed": question.corrections,
        "notes": list(notes),
        "steps": question.steps,
        "mean_response_tokens": question.response,
        "mean_prompt_tokens": question.prompt,
        "tokens_per_denoising_step": question.per_pass,
        "usable_bytes": usable(question),
        "recipe": vars(own) if isinstance(own, Refused) else _planned(question, *own),
        "layouts": [_planned(question, *one) for one in found],
        "refused": [vars(one) for one in refused],
    }


def _planned(question: Question, planned: Planned, totals: Totals) -> dict[str, Any]:
    memory = planned.memory
    return {
        "layout": vars(planned.split),
        "keys": planned.keys,
        "does_not_fit": why_not(question, planned),
        "memory_bytes": {phase: memory.sizes(phase) for phase in PHASES},
        "peak_bytes": {phase: memory.peak(phase) for phase in PHASES},
        "seconds_of_a_full_step": planned.seconds,
        **vars(totals),
    }
