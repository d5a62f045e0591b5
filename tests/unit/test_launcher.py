"""What a launcher says of a process: taken where it makes sense, else one line with the remedy."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from megatron_opdlm import launcher, parallel
from megatron_opdlm.errors import BAD_INPUT, InputError, RunError
from tests.forking import REPOSITORY

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}


def say(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in (*WHOLE, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("said", [{}, {"WORLD_SIZE": "1"}, {"MASTER_PORT": "x"}, WHOLE])
def test_what_makes_sense_is_taken(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]):
    """Claim: nothing, or everything that torchrun says."""
    say(monkeypatch, said)
    assert launcher.problem() is None
    assert (launcher.rank(), launcher.world_size()) == ((1, 2) if said is WHOLE else (0, 1))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE is not set", "MASTER_PORT is not set"]),
        ({"WORLD_SIZE": "2"}, ["RANK is not set"]),
        ({**WHOLE, "RANK": ""}, ["RANK is empty"]),
        ({**WHOLE, "RANK": "2"}, ["RANK=2, WORLD_SIZE=2"]),
        ({**WHOLE, "RANK": "-1"}, ["RANK=-1"]),
        ({**WHOLE, "WORLD_SIZE": "two"}, ["WORLD_SIZE=two"]),
        ({**WHOLE, "MASTER_PORT": "70000"}, ["MASTER_PORT=70000"]),
        ({**WHOLE, "MASTER_ADDR": ""}, ["MASTER_ADDR is empty"]),
        ({**WHOLE, "LOCAL_RANK": "none"}, ["LOCAL_RANK=none"]),
    ],
)
def test_what_makes_none_is_named(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], words: list[str]
):
    """Claim: the variables with what they hold, and the remedy."""
    say(monkeypatch, said)
    problem = launcher.problem()
    assert problem is not None and all(word in problem for word in words), problem
    assert problem.endswith("describe no process; start it with torchrun, or unset them")


def test_a_command_says_so_at_once():
    """Claim: a command that is started so ends with one line and code 2 before it reads anything,
    the reporter of errors included."""
    environment = {k: v for k, v in os.environ.items() if k not in WHOLE} | {"RANK": ""}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_opdlm.train", "--config", "nowhere"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=25,
    )
    assert done.returncode == BAD_INPUT
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: RANK is empty, WORLD_SIZE is not set")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch):
    """Claim: rank 0 names the port and a free one, and blames no other rank."""
    with socket.create_server(("", 0)) as other:
        taken = other.getsockname()[1]
        say(monkeypatch, {**WHOLE, "RANK": "0", "MASTER_PORT": str(taken)})
        with pytest.raises(InputError, match=f"^MASTER_PORT={taken}, .* is taken") as error:
            parallel._meet(timedelta(seconds=5))
    free = int(str(error.value).partition("such as MASTER_PORT=")[2].partition(" ")[0])
    assert free != taken


def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch):
    """Claim: who waits, where, and what to look at."""
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
    say(monkeypatch, {**WHOLE, "RANK": "0", "MASTER_PORT": port})
    with pytest.raises(RunError, match=f"^rank 0 of 2 did not meet .* MASTER_PORT={port}.*1/2"):
        parallel._meet(timedelta(seconds=1))
