"""Talk to a model: its answer appears block by block, as blocks are finished.

    opdlm chat MODEL [--mode ar] [--show-passes] [--thinking] [decoding flags]
    echo "What is 3 + 4?" | opdlm chat MODEL

MODEL is a Megatron checkpoint, an export or any Hugging Face directory with a chat template. On a
terminal Ctrl-C ends the answer and Ctrl-D the talk; from a pipe all of it is one question. Passes
are shown on terminals only. One process; for serving see docs/serving.md.
"""

import argparse
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from evaluation.decoding_flags import add_decoding_flags, decoding_from, loading_from
from evaluation.prompting import prompt_from
from evaluation.sample import open_generator
from megatron_opdlm import launcher
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, Stopped, command, report_failure
from megatron_opdlm.records import Block
from megatron_opdlm.reporting.sample_texts import as_subscript

_PASS_COLOURS = (32, 36, 33, 35, 31, 34)  # ANSI: green, cyan, yellow, ...; later passes repeat
Passes = Literal["hidden", "coloured", "numbered"]  # how a token's pass is shown
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes of a character that goes on decode to


class Screen:
    """Writes an answer's tokens as text while they come.

    ``passes``: each token in the colour of its pass, or with the number behind it. ``terminal``:
    control characters, which a terminal would obey, are replaced.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], object], *, terminal: bool, passes: Passes
    ) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._terminal, self._shown_passes = terminal, passes
        self.ids: list[int] = []
        self.passes: list[int] = []
        # Tokens from which the text is decoded, and up to which it is written: a token's text can
        # depend on the one before it.
        self._anchor = self._written = 0

    def add(self, block: Block) -> None:
        """One more block."""
        for token, number in zip(block.ids, block.committed_at, strict=True):
            self.ids.append(token)
            self.passes.append(number)
            self._show(last=False)

    def close(self) -> None:
        """Write what was held back."""
        self._show(last=True)

    @property
    def text(self) -> str:
        """The answer so far, without special tokens."""
        return self._decode(0, len(self.ids))

    def _show(self, *, last: bool) -> None:
        before = self._decode(self._anchor, self._written)
        text = self._decode(self._anchor, len(self.ids))[len(before) :]
        if not text or (text.endswith(_UNFINISHED) and not last):
            return
        self._anchor, self._written = self._written, len(self.ids)
        if self._terminal:
            text = "".join(_harmless(character) for character in text)
        if self._shown_passes == "coloured":
            text = _in_colour_of(self.passes[-1], text)
        elif self._shown_passes == "numbered":
            text += as_subscript(self.passes[-1])
        self._write(text)

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self.ids[start:stop], skip_special_tokens=True)


def _in_colour_of(number: int, text: str) -> str:
    return f"\x1b[{_PASS_COLOURS[(number - 1) % len(_PASS_COLOURS)]}m{text}\x1b[0m"


def _harmless(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) != "Cc":
        return character
    return _UNFINISHED


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the given function true; a second one is an ordinary
    interrupt.
    """
    asked = False

    def ask(_: int, __: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def answer(
    generator: Any,
    messages: list[dict[str, str]],
    decoding: Decoding,
    screen: Screen,
    *,
    thinking: bool,
) -> str:
    """Generate the next turn of a talk onto the screen; its text, which Ctrl-C cuts short.

    The number of the turn is the key of its random numbers.
    """
    turn = len(messages) // 2
    prompt = prompt_from(
        turn,
        {"messages": messages},
        generator.tokenizer,
        where="chat",
        enable_thinking=thinking,
    )
    decoding = replace(decoding, logit_shift=generator.logit_shift)
    with _interruptible() as stop:
        interruptible = replace(generator, stop=stop)
        with suppress(Stopped):
            interruptible.generate([prompt], decoding, [turn], committed=screen.add)
    screen.close()
    return screen.text


def _questions(terminal: bool) -> Iterator[str]:
    """What the user says: lines of a terminal until Ctrl-D, or all of a pipe at once."""
    if not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise InputError("no question came from standard input; write one into the pipe")
        yield text
        return
    import readline  # noqa: F401 -- input() gets a history and editing keys

    while True:
        try:
            text = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if terminal:
                print()
            if isinstance(end, KeyboardInterrupt):
                raise
            return
        if text:
            yield text


def _quieten_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()


def _require_template(tokenizer: Any, model: Path) -> None:
    if tokenizer is None:
        raise InputError(
            f"{model}: the model has no tokenizer; add its tokenizer files, or use "
            "opdlm sample with prompt_ids"
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"{model}: the tokenizer has no chat template; add a chat_template.jinja beside it, or "
            "use opdlm sample with prompts as raw text"
        )


def _passes(asked: bool, terminal: bool) -> Passes:
    """How passes are shown; a terminal without colours, or whose user wants none, has numbers."""
    if not asked or not terminal:
        return "hidden"
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return "numbered" if plain else "coloured"


def _greeting(args: argparse.Namespace, decoding: Decoding, passes: Passes) -> str:
    how = "autoregressive"
    if decoding.mode == "diffusion":
        how = f"blocks of {decoding.block_size} in at most {decoding.denoising_steps} passes"
    lines = [f"{args.model}: {how}. Ctrl-C ends an answer, Ctrl-D the talk."]
    if passes == "coloured":
        last = min(decoding.denoising_steps, len(_PASS_COLOURS)) if how[0] == "b" else 1
        lines.append(", ".join(_in_colour_of(n, f"pass {n}") for n in range(1, last + 1)))
    if passes == "numbered":
        lines.append("Behind each token: the pass of its block that committed it.")
    return "\n".join(lines)


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument(
        "--show-passes",
        action="store_true",
        help="colour tokens by their pass; numbers where NO_COLOR is set or TERM=dumb",
    )
    parser.add_argument("--thinking", action="store_true", help="of the chat template")
    add_decoding_flags(parser)
    return parser


def main() -> None:
    args = _parser().parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    if launcher.world_size() > 1:
        raise InputError(
            f"chat runs in one process, not in {launcher.world_size()}; start it without torchrun"
        )
    if not args.model.is_dir():
        raise InputError(
            f"MODEL {args.model}: no such directory; "
            "give a Hugging Face directory or a Megatron checkpoint"
        )
    _quieten_transformers()  # a question that is too long is refused in our words
    generator = open_generator(args.model, loading)
    _require_template(generator.tokenizer, args.model)
    terminal = sys.stdout.isatty()
    passes = _passes(args.show_passes, terminal)
    if terminal and sys.stdin.isatty():
        print(_greeting(args, decoding, passes), flush=True)
    messages: list[dict[str, str]] = []
    for question in _questions(terminal):
        messages.append({"role": "user", "content": question})
        screen = Screen(generator.tokenizer, _write, terminal=terminal, passes=passes)
        try:
            text = answer(generator, messages, decoding, screen, thinking=args.thinking)
        except InputError as error:  # a question that the model cannot take
            if not sys.stdin.isatty():
                raise
            report_failure(str(error))
            messages.pop()
            continue
        print(flush=True)
        messages.append({"role": "assistant", "content": text})


def _write(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    command(main)
