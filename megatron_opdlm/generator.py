"""Loads a model directory straight into a GPTModel and generates with the project's own engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm import launcher, parallel
from megatron_opdlm.checkpoint import load_model
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.decoder import DecoderKeeper
from megatron_opdlm.errors import InputError, Stopped
from megatron_opdlm.mailbox import Mailbox
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model.kernels import choose_kernels
from megatron_opdlm.model_files.huggingface_files import read_contract
from megatron_opdlm.model_files.manifest import (
    BlockContract,
    huggingface_dir,
    is_checkpoint,
    read_manifest,
)
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import check_layout, read_json, read_shape
from megatron_opdlm.model_files.vocabulary import load_tokenizer, mask_token, read_vocabulary
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Block, Prompt, Trajectory, Vocabulary
from megatron_opdlm.rollout import Request, generate_over_copies

# Ranks wait for the longest responses of the others, and for the first one to grade programs. A
# dead rank is the launcher's business.
TIMEOUT_SECONDS = 24 * 3600
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # auto: the hardware's


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model, its tokenizer and its ids; the ranks of a replica share its work.

    ``load_generator`` makes one of a directory; training makes one of its live student.
    """

    model: LanguageModel
    tokenizer: Any  # None where the directory has none
    vocabulary: Vocabulary
    contract: BlockContract | None  # None: no mask token is known, only --mode ar works
    no_mask: str = ""  # why not
    longest: int  # positions
    options: EngineOptions = EngineOptions()
    keeper: DecoderKeeper | None = None  # of the decoder between calls
    stop: Callable[[], bool] = lambda: False  # asked after every forward; True ends ``generate``

    @property
    def logit_shift(self) -> bool:
        """Whether the model was trained to predict position i from logits i - 1."""
        return self.contract is not None and self.contract.logit_shift

    @property
    def is_writer(self) -> bool:
        """True on the rank that writes files and prints."""
        return parallel.is_writer()

    def share(self, value: Any) -> Any:
        """The writer's value, on every rank."""
        return parallel.broadcast_object(value)

    def room(self, prompt: Prompt) -> int:
        """Positions that a prompt leaves for its response; less than 1: it is too long.

        Raises InputError for ids that the model does not have.
        """
        foreign = next((i for i in prompt.ids if not 0 <= i < self.vocabulary.size), None)
        if foreign is not None:
            raise InputError(
                f"prompt {prompt.index} holds id {foreign}; use ids from 0 to "
                f"{self.vocabulary.size - 1}, the model's vocabulary"
            )
        return self.longest - len(prompt.ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        samples: Sequence[int],
        finished: Callable[[Trajectory], None] | None = None,
        committed: Callable[[Block], None] | None = None,
    ) -> list[Trajectory]:
        """One trajectory a prompt, in input order, on every rank.

        The prompts are shared out over the copies of the model by length; one without work is
        legal. ``finished`` is called on the writer with each trajectory as it ends, on whatever
        rank that is; ``committed`` on every rank with each finished block of its copy of the model.
        Raises InputError for a prompt that leaves no room in the model's positions,
        and Stopped, on every rank, where ``stop`` ended it early.
        """
        if decoding.mode == "diffusion" and self.contract is None:
            raise InputError(self.no_mask)
        requests = [
            Request(sample=sample, prompt=prompt, max_new_tokens=self._limit(prompt, decoding))
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        post: dict[str, Any] = {}
        if finished is not None:
            mailbox = Mailbox(finished)
            post = {"finished": mailbox.finished, "close": mailbox.close}
        made = generate_over_copies(
            self.model,
            requests,
            decoding,
            self.vocabulary,
            key=(decoding.seed, 0),
            options=self.options,
            stop=self.stop,
            committed=committed,
            keeper=self.keeper,
            **post,
        )
        if not made.complete:
            raise Stopped("the evaluation was told to stop")
        return made.trajectories

    def _limit(self, prompt: Prompt, decoding: Decoding) -> int:
        room = self.room(prompt)
        if room < 1:
            raise InputError(
                f"prompt {prompt.index} has {len(prompt.ids)} tokens, but the model has "
                f"{self.longest} positions; shorten it"
            )
        return min(decoding.max_new_tokens, room)


def load_generator(
    model_dir: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    mask_token_id: int | None = None,
    dtype: str = "auto",
) -> Generator:
    """Load a Hugging Face directory or a Megatron checkpoint; data parallelism takes what is left.

    ``ep`` ranks share out the experts of a mixture. ``dtype``: auto (float32 on a CPU, bfloat16 on
    a GPU), fp32 or bf16. Layers and attention are those that training chooses for this hardware.
    Raises InputError for a directory that is no complete model, and for a layout that divides
    neither the ranks nor the model.
    """
    Layout(tensor=tp, pipeline=pp, expert=ep).data_parallel(launcher.world_size())
    manifest = read_manifest(model_dir) if is_checkpoint(model_dir) else None
    files = huggingface_dir(model_dir)
    shape = read_shape(files)
    check_layout(shape, tp, pp, str(model_dir), ep=ep)
    if manifest is None:
        open_weights(model_dir, shape).close()
    vocabulary, contract, no_mask = _ids(files, manifest and manifest.block_contract, mask_token_id)
    layout = Layout(
        tensor=tp,
        pipeline=pp,
        expert=ep,
        # Megatron's experts ask for it; while decoding it is switched off.
        sequence_parallel=tp > 1 and shape.experts is not None,
    )
    hardware = parallel.init(layout, timeout_seconds=TIMEOUT_SECONDS)
    kind = _DTYPES.get(dtype, hardware.dtype)
    kernels = choose_kernels("auto", "auto", kind, hardware, causal=False)
    model = build_model(shape, layout, kind, hardware, name=str(model_dir), kernels=kernels)
    load_model(model, model_dir)
    return Generator(
        model=model.requires_grad_(False).eval(),
        tokenizer=load_tokenizer(files),
        vocabulary=vocabulary,
        contract=contract,
        no_mask=no_mask,
        longest=shape.max_positions,
    )


def _ids(
    files: Path, recorded: BlockContract | None, override: int | None
) -> tuple[Vocabulary, BlockContract | None, str]:
    """Ids with a role. An autoregressive model needs no mask token, so one that is not to be had is
    an error only when diffusion is asked for."""
    if override is None and recorded is not None:
        override = recorded.mask_token_id
    try:
        mask = mask_token(files, override)
    except InputError as error:
        if override is not None:
            raise
        return read_vocabulary(files, need_mask=False), None, str(error)
    contract = recorded or read_contract(read_json(files / "config.json"), mask)
    return read_vocabulary(files, override), replace(contract, mask_token_id=mask), ""
