"""Errors that finish the job: one line with the value, the rule and the remedy, and the exit code
that says whose fault it was.
"""

import argparse
import difflib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from megatron_opdlm import launcher, written_values
from megatron_opdlm.launcher import rank, world_size

BAD_INPUT = 2
FAILURE = 1
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command continues
OPDLM = "opdlm"  # the command: launch/opdlm.py
_RANK_0_SECONDS = 30  # in which rank 0 finds the same bad input, says so, and the launcher ends all


class InputError(ValueError):
    """The user's input is wrong. The message is one line: value, rule, remedy. Exit code 2."""


class RunError(RuntimeError):
    """The run failed for a reason we can name in one line. Exit code 1."""


class Stopped(BaseException):
    """The run was asked to stop and did so; its message is one line. Exit code 75.

    Like KeyboardInterrupt no ``Exception``: nobody who handles failures shall take it for one.
    """


# How the types of flags are read; None: of those that name no type.
_READERS: dict[type | None, Callable[[str], Any]] = {
    int: written_values.integer,
    float: written_values.number,
    Path: lambda text: Path(written_values.path(text)),
    None: written_values.plain_text,
}


def _argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which says the message of its own error only."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} {error}") from error

    return convert


class Arguments(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors: one ``error:`` line and exit code 2.

    Its help names the command as it was typed, ``opdlm NAME`` or ``python -m MODULE``, and keeps
    the description's lines.
    """

    def __init__(self, description: str | None) -> None:
        module = getattr(sys.modules["__main__"], "__spec__", None)
        is_opdlm = sys.argv[0].startswith(f"{OPDLM} ")
        super().__init__(
            prog=sys.argv[0] if is_opdlm or module is None else f"python -m {module.name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for kind, read in _READERS.items():
            self.register("type", kind, _argument(read))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggestion for a mistyped name: ``" (did you mean 'x'?)"``, or an empty string when nothing
    is close.
    """
    matches = difflib.get_close_matches(name[:80], list(valid), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def report_failure(message: str) -> None:
    """Print the one ``error:`` line of this rank; ranks but the first name themselves."""
    _print_line("error: ", message if rank() == 0 else f"rank {rank()}: {message}")


def report_stop(message: str) -> None:
    """Print the one ``stopped:`` line of a run."""
    if rank() == 0:
        _print_line("stopped: ", message)


def _print_line(prefix: str, message: str) -> None:
    """stdout is flushed first so that the order on a terminal is right; below a progress bar a new
    line begins.
    """
    sys.stdout.flush()
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    print(("\n" if bars else "") + prefix + " ".join(message.split()), file=sys.stderr, flush=True)


def command(main: Callable[[], None]) -> NoReturn:
    """Run a command's ``main`` and exit with the contract's codes: 0 done, 2 bad input, 1 failure,
    75 stopped on request.

    Bad input is found on every rank alike, so rank 0 prints it and the others wait: a launcher
    stops all ranks as soon as one has left. A failure may happen on one rank alone, so every rank
    that fails names itself; a traceback is printed only for what we did not foresee.
    """
    try:
        if wrong := launcher.problem():
            raise InputError(wrong)
        main()
    except InputError as error:
        if rank() > 0:
            time.sleep(_RANK_0_SECONDS)
        report_failure(str(error))
        leave(BAD_INPUT)
    except KeyboardInterrupt:
        leave(130)
    except Stopped as stop:
        report_stop(str(stop))
        leave(STOPPED)
    except (RunError, OSError) as error:
        report_failure(str(error))
        leave(FAILURE)
    except Exception as error:  # the last resort of a command: name it, show where, fail
        traceback.print_exc()
        _print_line("error: ", f"rank {rank()}: unexpected {type(error).__name__}: {error}")
        leave(FAILURE)
    leave(0)


def leave(code: int) -> NoReturn:
    """Exit. After a failure, leave without the interpreter's shutdown: it can wait for collectives
    that never finish.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code and world_size() > 1:
        os._exit(code)
    sys.exit(code)
