"""What ``import megatron_opdlm as opdlm`` offers: a loaded model that generates and is scored.

docs/python.md. Runs in one process, or on every rank of a launcher, which then hold a copy each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opdlm.config import load_config
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError, nearest
from megatron_opdlm.generator import Generator, load_generator
from megatron_opdlm.prompts import render
from megatron_opdlm.records import Prompt, Trajectory
from megatron_opdlm.run import build
from megatron_opdlm.run.fixed_states import checked_state, measure_states


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response as a user gets it: through its first end token, or to the limit."""

    text: str  # without special tokens; "" of a model without a tokenizer
    prompt_ids: list[int]  # [P]
    ids: list[int]  # [R]
    committed_at: list[int]  # [R] 1-based denoising pass of each token within its block
    passes: int  # denoising passes of all blocks
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model directory; ``load`` makes one."""

    directory: Path
    generator: Generator
    mask_token_id: int | None  # as it was given to ``load``

    def generate(
        self,
        prompts: Sequence[str | list[int] | Mapping[str, Any]],
        *,
        thinking: bool = False,
        **decoding: Any,
    ) -> list[Response]:
        """One response a prompt, in their order.

        A prompt is a question (text, for the chat template), token ids, or a row of a prompts file
        such as ``{"prompt": "raw text"}`` or ``{"messages": [...]}``. ``decoding``: fields of
        ``Decoding``, e.g. ``mode="ar"``. The place of a prompt in the list is the key of its random
        numbers. Raises InputError for what the model cannot do.
        """
        if isinstance(prompts, str | Mapping):
            raise InputError("prompts is one prompt; give a list of them")
        wanted = [self._prompt(index, prompt, thinking) for index, prompt in enumerate(prompts)]
        rules = self._decoding(decoding)
        made = self.generator.generate(wanted, rules, range(len(wanted)))
        return [self._response(trajectory) for trajectory in made]

    def score(
        self,
        states: Sequence[Mapping[str, Any]],
        *,
        teacher: str | Path | None = None,
        overrides: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Loss of given states, as ``opdlm replay`` computes it: ``loss``, ``per_sequence``,
        ``grad_norm``, ``loss_tokens``, ``response_tokens``.

        A state is ``{"prompt_ids": [...], "response_ids": [...], "masked": [0/1, ...]}``.
        ``teacher``: a model directory; None: this model itself, autoregressive. ``overrides``:
        ``section.key=value``, e.g. ``loss.kind=...``. Both models are read from their directories
        for the call and freed after it. Raises InputError for a malformed state.
        """
        paths = [f"model.path={self.directory}", f"teacher.path={teacher or self.directory}"]
        if self.mask_token_id is not None:
            paths.append(f"model.mask_token_id={self.mask_token_id}")
        config = load_config(None, [*overrides, *paths])
        student, source = build.open_pair(config)
        vocab, longest = student.shape.vocab_size, student.shape.max_positions
        rows = [
            checked_state(f"state {number}", state, vocab, longest)
            for number, state in enumerate(states)
        ]
        if not rows:
            raise InputError("states is empty; give at least one")
        return measure_states(config, student, source, rows)

    def _prompt(self, index: int, prompt: object, thinking: bool) -> Prompt:
        row: Any = prompt
        if isinstance(prompt, str):
            row = {"question": prompt}
        elif isinstance(prompt, list):
            row = {"prompt_ids": prompt}
        try:
            ids = render(row, self.generator.tokenizer, thinking)
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from error
        if not ids:
            raise InputError(f"prompt {index} has no tokens; write some text")
        return Prompt(index=index, ids=ids)

    def _decoding(self, settings: Mapping[str, Any]) -> Decoding:
        known = Decoding().asked
        for name in settings:
            if name not in known:
                raise InputError(
                    f"{name!r} is no setting of decoding{nearest(name, known)}; "
                    f"there are {', '.join(known)}"
                )
        rules = Decoding(**settings).validate()
        return replace(rules, logit_shift=self.generator.logit_shift)

    def _response(self, trajectory: Trajectory) -> Response:
        tokenizer, ids = self.generator.tokenizer, trajectory.user_ids
        return Response(
            text=tokenizer.decode(ids, skip_special_tokens=True) if tokenizer is not None else "",
            prompt_ids=trajectory.prompt.ids,
            ids=ids,
            committed_at=trajectory.committed_at[: len(ids)],
            passes=trajectory.passes,
            finish_reason=trajectory.finish_reason,
        )


def load(directory: str | Path, *, mask_token_id: int | None = None) -> Model:
    """Open a Hugging Face directory, an export or a Megatron checkpoint and load its weights.

    ``mask_token_id``: where nothing in the directory names the mask token. Raises InputError for a
    directory that is no complete model.
    """
    path = Path(directory)
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory; give a Hugging Face directory or a Megatron checkpoint"
        )
    return Model(
        directory=path,
        generator=load_generator(path, mask_token_id=mask_token_id),
        mask_token_id=mask_token_id,
    )
