"""What a run would need and how long it would take, on GPUs that are not here.

    opdlm plan RECIPE --gpus 8 --gpu h200 [dotted.key=value ...]

Prints the memory of a rank by part and phase, the seconds of a step by phase, the hours, tokens and
operations of the run, for the recipe's own layout and for the fastest others that fit; and of each
layout that does not fit the reason. Needs no GPU and no weights. docs/planning.md
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.config import Config, load_config, require
from megatron_opdlm.errors import Arguments, InputError, command, nearest
from megatron_opdlm.planning.accelerators import ACCELERATORS, ASSUMED
from megatron_opdlm.planning.step_time import Machine

if TYPE_CHECKING:
    from launch.planner.estimate import Question

# Of the published general 8B run: 66 million trained tokens over 61,816 responses, and Figure 3's
# tokens a pass at the threshold of its rollouts.
RESPONSE_TOKENS, TOKENS_PER_PASS = 1068, 1.91
PROMPT_TOKENS = 200


def main() -> None:
    options = _parser().parse_intermixed_args()
    for name in ("gpus", "gpus_per_node", "top", "response_tokens", "prompt_tokens", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    if options.gpu not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise InputError(
            f"--gpu {options.gpu} is not known{nearest(options.gpu, ACCELERATORS)}; use {known}"
        )
    config = load_config(options.recipe, options.overrides)
    require(config, "model.path")
    _plan(config, options)


def _plan(config: Config, options: argparse.Namespace) -> None:
    from launch.planner import report
    from launch.planner.estimate import totals
    from launch.planner.layouts import Refused, as_it_is, search

    question, notes = _question(config, options)
    own = as_it_is(question)
    fitting, refused = search(question)
    mine = (
        own
        if isinstance(own, Refused)
        else (own, totals(question, own.config, own.split, own.memory))
    )
    shown = fitting[: options.top]
    pairs = [(one, totals(question, one.config, one.split, one.memory)) for one in shown]
    if options.json:
        print(json.dumps(report.record(question, notes, mine, pairs, refused), indent=2))
    else:
        left_out = len(fitting) - len(shown)
        print(report.text(question, notes, mine, pairs, refused, left_out))


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML recipe")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="all of them")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME", help=f"one of {', '.join(ACCELERATORS)}"
    )
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="of one machine (default: 8)"
    )
    parser.add_argument(
        "--response-tokens",
        type=int,
        metavar="N",
        help="mean length of a response where no limit of a step cuts it (default: "
        f"{RESPONSE_TOKENS}, that of the published 8B run)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=PROMPT_TOKENS,
        metavar="N",
        help=f"mean length of a prompt (default: {PROMPT_TOKENS})",
    )
    parser.add_argument(
        "--tokens-per-pass",
        type=float,
        metavar="X",
        help="that a denoising pass commits (default: the quota; with dynamic remasking in blocks "
        f"of 4 tokens {TOKENS_PER_PASS}, published for a threshold of 0.9)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="of the run (default: train.steps, or the data's)"
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="RUN",
        help="directory of a run on this GPU, whose seconds correct those that are computed",
    )
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="layouts that are shown (default: 3)"
    )
    parser.add_argument("--json", action="store_true", help="an object in place of text")
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="override a key of the recipe"
    )
    return parser


def _question(config: Config, options: argparse.Namespace) -> "tuple[Question, list[str]]":
    from launch.planner.estimate import Question
    from launch.planner.layouts import WHOLE, with_keys, with_rows
    from launch.planner.measured import corrections
    from megatron_opdlm.hardware.planned import planned_gpu
    from megatron_opdlm.run.dry_run import open_or_public
    from megatron_opdlm.run.expected_memory import most_of_a_step

    hardware = planned_gpu()
    config = with_rows(config, hardware)
    # Whether the recipe's own layout divides the GPUs is a finding, not an error.
    student, teacher, notes = open_or_public(with_keys(config, WHOLE), 1)
    load = most_of_a_step(config, student.shape)
    machine = Machine(
        gpu=ACCELERATORS[options.gpu], efficiency=ASSUMED, per_node=options.gpus_per_node
    )
    prompt = min(options.prompt_tokens, load.prompt)
    measured = options.measured
    question = Question(
        config=config,
        student=student,
        teacher=teacher,
        gpus=options.gpus,
        machine=machine,
        hardware=hardware,
        prompt=prompt,
        response=min(options.response_tokens or RESPONSE_TOKENS, load.response),
        per_pass=_tokens_per_pass(config, options.tokens_per_pass),
        steps=options.steps or _steps(config),
        corrections=corrections(measured, machine, hardware, prompt) if measured else {},
    )
    return question, notes


def _tokens_per_pass(config: Config, given: float | None) -> float:
    rollout = config.rollout
    quota = rollout.block_size / min(rollout.denoising_steps, rollout.block_size)
    if given is not None:
        if not quota <= given <= rollout.block_size:
            raise InputError(
                f"--tokens-per-pass {given:g}: a pass commits at least {quota:g} (rollout."
                f"block_size / rollout.denoising_steps) and at most {rollout.block_size} tokens"
            )
        return given
    if rollout.remasking != "low_confidence_dynamic":
        return quota
    return max(quota, min(TOKENS_PER_PASS, rollout.block_size))


def _steps(config: Config) -> int:
    """As the recipe says, or as many as its epochs take."""
    steps = config.train.stop_after or config.train.steps
    if steps > 0:
        return steps
    if not config.data.path or not Path(config.data.path).exists():
        raise InputError(
            f"train.steps=-1 takes as many steps as data.path={config.data.path} has prompts for, "
            "and it is not there; give --steps N"
        )
    from megatron_opdlm.data.rows import read_rows

    rows = len(read_rows(Path(config.data.path), "data.path"))
    return -(-rows // config.rollout.prompts_per_step) * config.data.epochs


if __name__ == "__main__":
    command(main)
