"""evaluation.run and evaluation.sample around a hand-written generator."""

import argparse
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from evaluation.decoding_flags import add_decoding_flags, decoding_from, loading_from
from evaluation.prompting import prompt_from
from evaluation.run import evaluate, load_tasks, prompts_of
from evaluation.sample import read_prompts, sample
from evaluation.tasks import get_task
from launch.quickstart.teacher import build_tokenizer
from megatron_opdlm import mailbox
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.records import Prompt, Trajectory
from megatron_opdlm.reporting.progress import Progress
from tests.tiny_models import make_tokenizer

END, PAD = 1, 0


@dataclass
class AnsweringGenerator:
    """Answers ``a+b=`` with ``#`` and a + b (second samples: plus ``offset``) in whole
    blocks of 4.
    """

    offset: int = 0
    tokenizer: Any = field(default_factory=build_tokenizer)
    is_writer: bool = True
    logit_shift: bool = True
    longest: int = 100
    seen: list[tuple[Decoding, list[int]]] = field(default_factory=list)

    def generate(
        self,
        prompts: list[Prompt],
        decoding: Decoding,
        samples: list[int],
        finished: Callable[[Trajectory], None] = lambda _: None,
    ) -> list[Trajectory]:
        self.seen.append((decoding, samples))
        made = [self._answer(p, s) for p, s in zip(prompts, samples, strict=True)]
        for trajectory in reversed(made):
            finished(trajectory)
        return made

    def room(self, prompt: Prompt) -> int:
        return self.longest - len(prompt.ids)

    def share(self, value: Any) -> Any:
        return value

    def _answer(self, prompt: Prompt, sample: int) -> Trajectory:
        a, b = self.tokenizer.decode(prompt.ids).rstrip("=").split("+")
        number = int(a) + int(b) + self.offset * (sample >> 32)
        user = [*self.tokenizer.encode(f"#{number}"), END]
        whole = user + [PAD] * (-(len(prompt.ids) + len(user)) % 4)
        return Trajectory(
            sample=sample,
            prompt=prompt,
            response_ids=whole,
            committed_at=[1 + i % 4 for i in range(len(whole))],
            response_tokens=len(user),
            finish_reason="stop",
            forwards=5,
            passes=4,
        )


@pytest.fixture
def data(tmp_path):
    rows = [{"question": "2+3=", "answer": "5"}, {"question": "57+68=", "answer": "125"}]
    (tmp_path / "addition.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_run_grades_text_without_special_tokens_and_counts_what_was_generated(data):
    """Two problems of 3 and 5 response tokens, 4 passes and 5 forwards each: 8/8 and 8/10."""
    generator = AnsweringGenerator()
    tasks = load_tasks(["addition"], data, None)
    [summary], predictions = evaluate(generator, tasks, Decoding(), 1, {"model": "m"})
    assert (summary["n"], summary["accuracy"]) == (2, 1.0)
    assert summary["tokens_per_denoising_step"] == 8 / 8
    assert summary["tokens_per_forward"] == 8 / 10
    assert summary["mean_response_tokens"] == 4.0
    assert summary["settings"]["model"] == "m"
    assert summary["settings"]["denoising_steps"] == 4
    first = predictions[0]
    assert (first["index"], first["prompt"], first["responses"]) == (0, "2+3=", ["#5"])
    assert first["response_ids"] == [[15, 7, END]]  # "#", "5", end; the padded rest is cut
    assert first["committed_at"] == [[1, 2, 3]]
    assert (first["correct"], first["extracted"], first["flags"]) == ([True], ["5"], [[]])


def test_several_responses_are_keyed_apart_and_averaged(data):
    """Two problems of two responses; second samples are wrong, so accuracy is 0.5. The first
    sample's key is the problem's number, whatever the number of samples."""
    generator = AnsweringGenerator(offset=1)
    tasks = load_tasks(["addition"], data, None)
    [summary], predictions = evaluate(generator, tasks, Decoding(temperature=1.0), 2, {})
    assert generator.seen[0][1] == [0, 1 << 32, 1, (1 << 32) + 1]
    assert summary["accuracy"] == 0.5
    assert predictions[1]["correct"] == [True, False]


def test_prompts_without_room_count_as_wrong(data):
    """Claim: they are flagged, counted and reported; the others are generated. Where none fits, it
    is an error."""
    tasks = load_tasks(["addition"], data, None)
    generator = AnsweringGenerator(longest=6)  # "2+3=" has 4 tokens, "57+68=" has 6
    [summary], predictions = evaluate(generator, tasks, Decoding(), 1, {})
    assert (summary["accuracy"], summary["prompts_too_long"]) == (0.5, 1)
    assert predictions[1]["flags"] == [["no_answer", "prompt_too_long"]]
    assert predictions[1]["finish_reason"] == ["prompt_too_long"]
    with pytest.raises(InputError, match="no prompt fits the model: the shortest has 4 tokens"):
        evaluate(AnsweringGenerator(longest=4), tasks, Decoding(), 1, {})


def test_a_prefill_is_continued_without_thinking():
    """Claim: the template opens the assistant's turn as it does without thinking, and the prefill
    follows as it stands."""
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "so"}]
    prompt = prompt_from(0, {"messages": messages}, tokenizer, where="x", enable_thinking=True)
    text = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n--\nso"
    assert tokenizer.decode(prompt.ids) == text


def test_thinking_is_asked_of_tasks_that_may_think():
    """Claim: LCB-v6 and the EvalPlus tasks are asked without thinking, the others as told."""
    row = {"question": "2+2", "ground_truth_answer": "4"}
    ends = {}
    for name in ("GSM8K", "LCB-v6"):
        for thinking in (False, True):
            [prompt] = prompts_of(get_task(name), [row], make_tokenizer(), enable_thinking=thinking)
            ends[name, thinking] = str(make_tokenizer().decode(prompt.ids)).endswith("--\n")
    assert ends == {
        ("GSM8K", False): True,
        ("GSM8K", True): False,
        ("LCB-v6", False): True,
        ("LCB-v6", True): True,
    }
    assert not get_task("HumanEval").may_think and not get_task("MBPP").may_think


def test_letters_between_ranks_hold_data_only():
    """Claim: what one rank writes into the store the writer reads back; anything else is refused
    without being run."""
    ids = build_tokenizer().encode("1+2=")
    prompt = Prompt(index=3, ids=ids, domain="maths", extra={"level": 2})
    [letter] = AnsweringGenerator().generate([prompt], Decoding(), [7])
    assert mailbox.read(mailbox.written(letter).encode()) == letter
    assert mailbox.read(mailbox.written(None).encode()) is None
    for forged in (pickle.dumps(letter), b"{}", b"[1]", b"true", b'{"prompt": {"index": 1}}'):
        with pytest.raises(RunError, match="none of them wrote"):
            mailbox.read(forged)


def test_a_line_now_and_then(monkeypatch, capsys):
    """Claim: without a terminal there is a line after half a minute, with rate and time left of
    this process."""
    now = 0.0
    monkeypatch.setattr("megatron_opdlm.reporting.progress.time.monotonic", lambda: now)
    with Progress("GSM8K", 10, 4, show=True) as progress:
        now = 10.0
        progress.advance(40)
        now = 40.0
        progress.advance(80)
        progress.advance(100)
    assert capsys.readouterr().err == ("GSM8K: 6 of 10 responses, 3 tokens/s, 1.3 minutes left\n")


def test_the_models_recorded_logit_shift_is_used(data):
    """Readers do not choose the shift; the model directory records it."""
    generator = AnsweringGenerator()
    evaluate(generator, load_tasks(["addition"], data, 1), Decoding(), 1, {})
    assert generator.seen[0][0].logit_shift


def test_sample_keeps_the_input_row_and_its_order(tmp_path):
    """All ways to ask; keys of the input are carried through."""
    rows = [
        {"prompt": "2+3=", "id": "a"},
        {"prompt_ids": [4, 12, 4, 13]},  # "2+2="
        {"messages": [{"role": "user", "content": "57+68="}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = sample(AnsweringGenerator(), read_prompts(path), Decoding(), "--prompts")
    assert [row["response"] for row in results] == ["#5", "#4", "#125"]
    assert results[0]["id"] == "a"
    assert set(results[0]) - set(rows[0]) == {
        "response_ids",
        "response",
        "committed_at",
        "forwards",
        "passes",
        "finish_reason",
    }
    assert len(results[2]["committed_at"]) == len(results[2]["response_ids"]) == 5


def test_a_model_without_tokenizer_takes_and_gives_ids_only(data):
    """Token ids go through; text in, or grading, is one error."""
    reader = AnsweringGenerator()
    [row] = sample(reader, [{"prompt_ids": [4, 12, 4, 13]}], Decoding(), "--prompts")

    class WithoutTokenizer(AnsweringGenerator):
        def _answer(self, prompt: Prompt, sample: int) -> Trajectory:
            return reader._answer(prompt, sample)

    bare = WithoutTokenizer(tokenizer=None)
    [ids_only] = sample(bare, [{"prompt_ids": [4, 12, 4, 13]}], Decoding(), "--prompts")
    assert ids_only == {**row, "response": ""}
    with pytest.raises(InputError, match="row 0: the model has no tokenizer; give prompt_ids"):
        sample(bare, [{"prompt": "2+2="}], Decoding(), "--prompts")
    with pytest.raises(InputError, match="no tokenizer, text cannot be graded"):
        evaluate(bare, load_tasks(["addition"], data, None), Decoding(), 1, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1: a row needs messages, question or prompt_ids; this one has text"),
        (
            {"question": "a", "prompt_ids": [1]},
            "line 1: a row has question or prompt_ids, not both",
        ),
        ({"prompt_ids": []}, "line 1: the prompt is empty"),
        ({"prompt": ""}, "line 1: the prompt is empty"),
        ({"prompt_ids": [1, "2"]}, "line 1: prompt_ids must be a list of token ids"),
        ({"prompt_ids": [-1]}, "line 1: prompt_ids must be a list of token ids"),
    ],
)
def test_bad_prompts_are_named(tmp_path, row, message):
    """Found before a model is loaded."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_decoding_flags(parser)
    return parser.parse_args(argv)


def test_flags_become_settings():
    """Every decoding flag of the contract reaches its field."""
    argv = (
        "--block-size 8 --denoising-steps 2 --remasking entropy_bounded --threshold 0.8"
        " --entropy-bound 0.2 --temperature 0.7 --top-p 0.9 --top-k 20 --max-new-tokens 33"
        " --seed 5 --mode diffusion"
    )
    assert decoding_from(parse(*argv.split())) == Decoding(
        block_size=8,
        denoising_steps=2,
        remasking="entropy_bounded",
        threshold=0.8,
        entropy_bound=0.2,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        max_new_tokens=33,
        seed=5,
    )


@pytest.mark.parametrize(
    ("world", "argv", "message"),
    [
        ("1", ("--tp", "2"), "--tp 2 --pp 1: .*does not divide the 1 started"),
        ("4", ("--tp", "3"), "does not divide the 4 started"),
        ("4", ("--pp", "0"), "--pp 0 must be at least 1"),
        ("4", ("--tp", "2", "--ep", "4"), "--ep 4 does not divide the 2 ranks"),
    ],
)
def test_layouts_that_do_not_fit_the_started_processes(monkeypatch, world, argv, message):
    """The launcher's world size is known before torch is."""
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(InputError, match=message):
        loading_from(parse(*argv))


REFUSED = [
    ("run", ("--tasks", "adition"), "task 'adition': not known"),
    (
        "run",
        ("--tasks", "addition", "--remasking", "x"),
        "--remasking x must be one of low_confidence_static",
    ),
    ("run", ("--tasks", "addition", "addition"), "names a task twice"),
    ("run", ("--tasks", "addition", "--limit", "0"), "--limit 0"),
    ("run", ("--tasks", "exact_match"), r"exact_match\.jsonl, which is missing"),
    ("sample", ("--prompts", "absent.jsonl"), "no such file"),
    ("sample", ("--prompts", "absent.jsonl", "--model", "absent"), "no such directory"),
]
WITHOUT_TORCH = """
import importlib, json, sys
sys.modules["torch"] = None
from megatron_opdlm.errors import command
for module, argv in json.loads(sys.argv[1]):
    sys.argv = [module, *argv]
    try:
        command(importlib.import_module("evaluation." + module).main)
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr)
"""


def test_commands_end_with_one_error_line_and_code_2(data):
    """Bad input: one ``error:`` line, exit code 2, no output, found without importing torch."""
    out = data / "out"
    common = ["--model", str(data), "--out", str(out)]
    where = {"run": ["--data", str(data)], "sample": []}
    commands = [(module, [*common, *where[module], *argv]) for module, argv, _ in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == 2 * len(REFUSED), done.stderr
    for error, code, (*_, message) in zip(said[::2], said[1::2], REFUSED, strict=True):
        assert error.startswith("error: ") and re.search(message, error), error
        assert code == "exit code 2"
    assert not out.exists()
