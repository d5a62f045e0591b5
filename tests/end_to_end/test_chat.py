"""``opdlm chat`` on a pseudo-terminal and in a pipe, and the blocks that it shows."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation import chat
from evaluation.chat import Screen
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Block
from megatron_opdlm.rollout import generate
from tests.conftest import MASK, TinyModels
from tests.distributed import jobs
from tests.tiny_models import edit_json, make_qwen3
from tests.tiny_requests import IDS, request

ROOT = Path(__file__).parents[2]
SECONDS = 120
COLOUR = re.compile(r"\x1b\[(\d+)m")


def test_blocks_are_the_response_and_change_nothing(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch
):
    """Claim: with a listener every token and pass is what it is without; the blocks of a sample,
    joined, are what its user gets: nothing of the prompt, nothing after the end. Also where pages
    are few, so that a sequence has to leave and goes on later, and autoregressive."""
    left = jobs.small_pages(monkeypatch)
    model = jobs.load(Layout(), models.hf("student", tied=True, layers=2))
    requests = [request(i, 3 + i, limit=30) for i in range(6)]
    tight = EngineOptions(attention="rows", kv_cache_tokens=96, slots=5)
    blocks = Decoding(block_size=4, denoising_steps=3, temperature=1.0)
    for rules, vocabulary in (
        (blocks, jobs.without_end(IDS)),
        (blocks, IDS),
        (Decoding(mode="ar", temperature=1.0), IDS),
    ):
        silent = generate(model, requests, rules, vocabulary, key=(1, 1), options=tight)
        heard: dict[int, list[Block]] = {one.sample: [] for one in requests}

        def listen(block: Block, heard: dict[int, list[Block]] = heard) -> None:
            heard[block.sample].append(block)

        spoken = generate(
            model, requests, rules, vocabulary, key=(1, 1), options=tight, committed=listen
        )
        assert spoken.trajectories == silent.trajectories
        for made in spoken.trajectories:
            ids = [token for block in heard[made.sample] for token in block.ids]
            passes = [number for block in heard[made.sample] for number in block.committed_at]
            assert ids == made.user_ids
            assert passes == made.committed_at[: made.response_tokens]
            size = 1 if rules.mode == "ar" else rules.block_size
            assert len(heard[made.sample]) == -(-len(made.response_ids) // size)
    assert left


class Bytes:
    """A tokenizer of single bytes, as byte-level ones have them for rare characters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_screen_waits_for_whole_characters_and_disarms_controls():
    """Claim: a character of several tokens appears once, whole; an escape sequence of the model
    does not reach the terminal; each piece has its pass's colour."""
    said: list[str] = []
    screen = Screen(Bytes(), said.append, terminal=True, passes="hidden")
    for token in "né€\x1b[2J!".encode():
        screen.add(Block(sample=0, ids=[token], committed_at=[1]))
    screen.close()
    assert "".join(said) == "né€\N{REPLACEMENT CHARACTER}[2J!"
    assert screen.text == "né€\x1b[2J!"
    said.clear()
    coloured = Screen(Bytes(), said.append, terminal=True, passes="coloured")
    coloured.add(Block(sample=0, ids=[97, 98], committed_at=[2, 1]))
    assert [COLOUR.findall(piece)[0] for piece in said] == ["36", "32"]
    said.clear()
    numbered = Screen(Bytes(), said.append, terminal=True, passes="numbered")
    numbered.add(Block(sample=0, ids=[97, *"é".encode()], committed_at=[2, 1, 12]))
    assert said == ["a₂", "é₁₂"]


def test_passes_are_numbers_where_colours_are_not_wanted(monkeypatch: pytest.MonkeyPatch):
    """Claim: NO_COLOR (not empty) and TERM=dumb turn colours into numbers; a pipe shows neither."""
    monkeypatch.setenv("TERM", "xterm")
    for no_color, term, expected in (
        ("", "xterm", "coloured"),
        ("1", "xterm", "numbered"),
        ("", "dumb", "numbered"),
    ):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", term)
        assert chat._passes(asked=True, terminal=True) == expected
        assert chat._passes(asked=True, terminal=False) == "hidden"
        assert chat._passes(asked=False, terminal=True) == "hidden"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that hardly ever ends an answer by itself: its end token is one of 67."""
    path = tmp_path_factory.mktemp("chat") / "model"
    return make_qwen3(path, tied=True, seed=3, layers=2, max_position_embeddings=4096)


def command(model: Path, *flags: object) -> list[str]:
    line = [sys.executable, "-m", "launch.opdlm", "chat", model, f"--mask-token-id={MASK}"]
    return [str(word) for word in [*line, *flags]]


def read_until(terminal: int, pattern: str, seconds: float = SECONDS) -> str:
    """What comes until ``pattern`` is in it."""
    text, deadline = "", time.monotonic() + seconds
    while not re.search(pattern, text):
        ready, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"{pattern!r} did not come: {text!r}"
        try:
            text += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            raise AssertionError(f"ended before {pattern!r}: {text!r}") from None
    return text


def test_a_talk_on_a_terminal(model: Path):
    """Claim: on a terminal tokens come in colours by their pass, Ctrl-C ends an answer and not the
    talk, nor does a question that is too long, Ctrl-D ends it with code 0."""
    ours, theirs = pty.openpty()
    flags = ["--show-passes", "--max-new-tokens=3900", "--temperature=1"]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
    with subprocess.Popen(
        command(model, *flags),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment,
    ) as process:
        os.close(theirs)
        try:
            assert "Ctrl-D" in read_until(ours, "> $")
            os.write(ours, b"1 + 1\n")
            shown = read_until(ours, r"(\x1b\[\d+m[^\x1b]*\x1b\[0m\s*){8}")
            assert len(set(COLOUR.findall(shown)) - {"0"}) > 1
            process.send_signal(signal.SIGINT)
            read_until(ours, "> $")
            for _ in range(7):  # more than there are positions, in pieces that a terminal holds
                os.write(ours, b"1" * 600)
                read_until(ours, "1")
            os.write(ours, b"\n")
            read_until(ours, r"error: .*shorten it\s+> $")
            os.write(ours, b"\x04")
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
            os.close(ours)


def test_a_pipe_gets_plain_text_and_bad_models_a_remedy(model: Path, tmp_path: Path):
    """Claim: a question from a pipe is answered without colours, the whole pipe is one question;
    without chat template the command ends with 2 and says what to do."""
    asked = command(model, "--show-passes", "--max-new-tokens=8", "--mode=ar")
    done = subprocess.run(
        asked, input="a\nb", capture_output=True, text=True, cwd=ROOT, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and "\x1b" not in done.stdout and ">" not in done.stdout
    bare = make_qwen3(tmp_path / "bare", tied=True, seed=3, layers=2)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(bare / "tokenizer_config.json", chat_template=None)
    refused = subprocess.run(
        command(bare), input="a", capture_output=True, text=True, cwd=ROOT, timeout=SECONDS
    )
    assert refused.returncode == 2 and not refused.stdout
    assert "chat_template.jinja" in refused.stderr
