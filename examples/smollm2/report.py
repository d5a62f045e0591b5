"""report.md and report.json of the example: what training did to the KL, how likely the teacher
finds the student's answers, GSM8K, and answers as text, one of them pass by pass.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.run import TEXTS_ONLY, TRAININGS
from megatron_opdlm.errors import Arguments, command
from megatron_opdlm.model_files.shape import read_json
from megatron_opdlm.model_files.writing import write_json
from megatron_opdlm.prompts import render

MODELS = {
    "teacher": "teacher, one token a forward",
    "before": "untrained student",
    "warm_up": "warmed-up student, one token a pass",
    "static": "student, one token a pass",
    "sequential": "student, one token a pass, from left to right",
    "dynamic": "student, all tokens above 0.9",
}
PARTS = ("rollout", "teacher", "update")
SHOWN = 4  # questions whose answers are printed
BLOCKS = 6  # of the trajectory
HIDDEN, NEW_LINE = "▁", "⏎"  # a masked token, and a line's end, as they are shown


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR", help="of examples/smollm2/run.sh")
    out = parser.parse_args().out
    answers = {name: rows(out / "answers" / f"{name}.jsonl") for name in MODELS}
    tokenizer = AutoTokenizer.from_pretrained(out / "imported" / "huggingface")
    perplexity = perplexities(out / "model", answers, tokenizer)
    scores = {
        name: json.loads((out / "evaluation" / name / "summary.json").read_text())[0]
        for name in MODELS
        if name not in TEXTS_ONLY
    }
    trainings = {name: rows(out / name / "metrics.jsonl") for name in TRAININGS}
    record = {
        "trainings": {
            name: {
                "steps": steps[-1]["step"],
                "updates": sum(step["updates"] for step in steps),
                "trained_tokens": steps[-1]["cumulative_trained_tokens"],
                "seconds": sum(step[f"seconds_{part}"] for step in steps for part in PARTS),
            }
            for name, steps in trainings.items()
        },
        "held_out": {
            name: read_json(out / "kl" / f"{name}.json") for name in ("before", *TRAININGS)
        },
        "perplexity_under_teacher": perplexity,
        "tokens_per_denoising_step": {
            name: tokens(answers[name]) / sum(row["passes"] for row in answers[name])
            for name in MODELS
            if name != "teacher"
        },
        "gsm8k": {
            name: {key: row[key] for key in ("n", "accuracy", "stderr")}
            for name, row in scores.items()
        },
    }
    write_json(out / "report.json", record)
    block_size = read_json(out / "exported" / "config.json")["block_size"]
    shown = trajectory(answers["static"][0], tokenizer, block_size)
    text = "\n\n".join((figures(record), kl_table(record), texts(answers), shown))
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(f"wrote {out / 'report.md'}")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tokens(answered: list[dict[str, Any]]) -> int:
    return sum(len(row["response_ids"]) for row in answered)


@torch.no_grad()
def perplexities(
    teacher: Path, answers: dict[str, list[dict[str, Any]]], tokenizer: Any
) -> dict[str, float]:
    """exp of the mean negative log-likelihood of all response tokens, by transformers in float32.
    The teacher has no row for the mask token, which no answer holds.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    found = {}
    for name, answered in answers.items():
        total = 0.0
        for row in answered:
            prompt = render({"question": row["question"]}, tokenizer, False)
            ids = torch.tensor([[*prompt, *row["response_ids"]]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= float(logits.gather(1, ids[0, len(prompt) :, None]).sum())
        found[name] = math.exp(total / max(1, tokens(answered)))
    return found


def figures(record: dict[str, Any]) -> str:
    lines = ["# SmolLM2-135M-Instruct as a block-diffusion model", ""]
    lines += [
        f"{name}: {made['steps']} steps, {made['updates']} updates, {made['trained_tokens']:,} "
        f"trained tokens, {made['seconds'] / 60:.0f} minutes."
        for name, made in record["trainings"].items()
    ]
    lines += [
        "",
        "| | perplexity under the teacher | tokens a pass | GSM8K, short questions |",
        "|---|---|---|---|",
    ]
    for name, what in MODELS.items():
        passes = record["tokens_per_denoising_step"].get(name)
        score = record["gsm8k"].get(name)
        graded = f"{score['accuracy']:.1%} of {score['n']}" if score else "-"
        shown = "-" if passes is None else f"{passes:.2f}"
        perplexity = record["perplexity_under_teacher"][name]
        lines.append(f"| {what} | {perplexity:.2f} | {shown} | {graded} |")
    return "\n".join(lines)


def kl_table(record: dict[str, Any]) -> str:
    found = record["held_out"]
    masked = list(found["before"])
    lines = [
        "On the teacher's answers to questions that training did not see, by masked tokens of 4:",
        "",
        "| | " + " | ".join(f"{number}" for number in masked) + " |",
        "|---|" + "---|" * len(masked),
    ]
    for name, rows in found.items():
        for key, what in (("kl", "KL, nats"), ("student_sure", "surer than 0.9")):
            values = " | ".join(f"{rows[number][key]:.3f}" for number in masked)
            lines.append(f"| {name}: {what} | {values} |")
    return "\n".join(lines)


def texts(answers: dict[str, list[dict[str, Any]]]) -> str:
    parts = ["## Answers to questions that training did not see"]
    for number in range(min(SHOWN, len(answers["teacher"]))):
        parts.append(f"**{answers['teacher'][number]['question']}**")
        parts += [
            f"*{what}*: {' '.join(answers[name][number]['response'].split())}"
            for name, what in MODELS.items()
        ]
    return "\n\n".join(parts)


def trajectory(row: dict[str, Any], tokenizer: Any, block_size: int) -> str:
    """An answer as it stood after each pass of its first blocks. Blocks are counted from the start
    of the prompt, so the first may be short.
    """
    ids, committed = row["response_ids"], row["committed_at"]
    prompt = len(render({"question": row["question"]}, tokenizer, False))
    block = [(prompt + i) // block_size for i in range(len(ids))]
    lines = ["## One answer, pass by pass", "", f"**{row['question']}**", "", "```"]
    for number in sorted(set(block))[:BLOCKS]:
        own = [i for i in range(len(ids)) if block[i] == number]
        for step in sorted({committed[i] for i in own}):
            shown = "".join(
                tokenizer.decode([ids[i]]) if i < own[0] or committed[i] <= step else HIDDEN
                for i in range(own[-1] + 1)
            )
            lines.append(shown.replace("\n", NEW_LINE))
    return "\n".join([*lines, "```"])


if __name__ == "__main__":
    command(main)
