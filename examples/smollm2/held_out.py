"""KL from the teacher to a student on questions that training did not see.

The states are the teacher's own answers with 1, 2, 3 or all 4 tokens of every whole block masked,
places drawn once. Also: how often teacher and student are surer than 0.9 of one token, and how
often they expect the same one.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.config import load_config
from megatron_opdlm.diffusion.blocks import block_lengths
from megatron_opdlm.errors import Arguments, command
from megatron_opdlm.model.vocab_parallel import project, select_positions
from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.model_files.writing import write_json
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.prompts import render
from megatron_opdlm.records import State, Vocabulary
from megatron_opdlm.run import build
from megatron_opdlm.run.session import packing_of
from megatron_opdlm.states import make_state
from megatron_opdlm.teacher import score

TOKENS = 64  # of an answer
ROWS = 256  # positions projected at once
SURE = 0.9
FIGURES = ("kl", "student_sure", "teacher_sure", "same_token")


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--student", required=True, type=Path)
    parser.add_argument("--teacher", required=True, type=Path)
    parser.add_argument("--answers", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--problems", type=int, default=24, help="answers (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    lines = args.answers.read_text(encoding="utf-8").splitlines()[: args.problems]
    found = measure(args, [json.loads(line) for line in lines])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, found)
    print(" | ".join(f"{masked} masked: {row['kl']:.3f} nats" for masked, row in found.items()))


def measure(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the masked positions, by masked tokens of a block."""
    paths = (f"model.path={args.student}", f"teacher.path={args.teacher}")
    config = load_config(None, [*args.overrides, *paths])
    source, teacher_source = build.open_pair(config)
    hardware = parallel.init(model_layout(config), seed=0, timeout_seconds=600)
    student, teacher = (
        build.build_teacher(one, config, hardware) for one in (source, teacher_source)
    )
    size = config.rollout.block_size
    tokenizer = load_tokenizer(source.files)
    prompts = [render({"question": row["question"]}, tokenizer, False) for row in rows]
    asked = list(states(prompts, [row["response_ids"] for row in rows], source.vocabulary, size))
    step = pack_step([asked], packing_of(config, source, hardware))
    by_masked: dict[int, list[Tensor]] = {}
    with torch.inference_mode():
        targets = score(teacher, step.finished)
        assert isinstance(targets, Tensor)
        for batch in step.updates[0]:
            output = student.run(batch.student_tokens, batch.student_positions, batch.student_plan)
            read = select_positions(output, batch.student_read, sequence_parallel=False)
            masked = (batch.masked_share * size).round().long()
            for at in torch.arange(len(read)).split(ROWS):
                log_q = project(read[at], student.head_weight, student.shard)
                log_p = project(targets[batch.target[at]], teacher.head_weight, teacher.shard)
                values = compared(log_p.log_softmax(-1), log_q.log_softmax(-1))
                for number in masked[at].unique().tolist():
                    by_masked.setdefault(number, []).append(values[masked[at] == number])
    return {
        str(number): dict(zip(FIGURES, torch.cat(parts).mean(0).tolist(), strict=True))
        | {"positions": float(sum(map(len, parts)))}
        for number, parts in sorted(by_masked.items())
    }


def states(
    prompts: list[list[int]], answers: list[list[int]], vocabulary: Vocabulary, size: int
) -> Iterator[State]:
    """Every answer with 1 .. size masked tokens in each of its whole blocks."""
    generator = torch.Generator().manual_seed(0)
    for number, (prompt, whole) in enumerate(zip(prompts, answers, strict=True)):
        answer = whole[:TOKENS]
        answer = answer[: len(answer) - (len(prompt) + len(answer)) % size]
        lengths = block_lengths(len(prompt), len(answer), size, 0)
        for masked in range(1, size + 1):
            mask: list[bool] = []
            for length in lengths:
                chosen = torch.randperm(length, generator=generator)[:masked].tolist()
                mask += [length == size and i in chosen for i in range(length)]
            yield make_state(number, prompt, answer, mask, vocabulary, exclude_eos=False)


def compared(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log-probabilities [M, V] of teacher and student -> FIGURES [M, 4]"""
    # A padding row is -inf in both: its probability of 0 counts nothing.
    kl = (log_p.exp() * (log_p - log_q).nan_to_num(0.0)).sum(-1)
    (top_q, token_q), (top_p, token_p) = log_q.max(-1), log_p.max(-1)
    sure = torch.tensor(SURE).log()
    return torch.stack([kl, top_q > sure, top_p > sure, token_q == token_p], dim=-1)


if __name__ == "__main__":
    command(main)
