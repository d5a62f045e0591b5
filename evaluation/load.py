"""Loads a model directory straight into a GPTModel and generates with the project's own engine."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint_tools.hf_files import read_contract
from checkpoint_tools.manifest import BlockContract, is_checkpoint, read_manifest
from checkpoint_tools.qwen3_shape import check_layout, read_json, read_shape
from checkpoint_tools.safetensors_dir import open_weights
from checkpoint_tools.vocabulary import load_tokenizer, mask_token, read_vocabulary
from megatron_opdlm import parallel
from megatron_opdlm.checkpoint import huggingface_dir, load_model
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from megatron_opdlm.model.qwen3 import Qwen3, build_model
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Prompt, Trajectory, Vocabulary
from megatron_opdlm.rollout import Request, generate
from megatron_opdlm.slots import split_over_replicas

SLOTS = 128  # sequences decoded at once on a data-parallel rank


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A loaded model, its tokenizer and its ids; the ranks of a replica share its work."""

    model: Qwen3
    tokenizer: Any  # None where the directory has none
    vocabulary: Vocabulary
    contract: BlockContract | None  # None: no mask token is known, only --mode ar works
    no_mask: str  # why not
    longest: int  # positions

    @property
    def logit_shift(self) -> bool:
        """Whether the model was trained to predict position i from logits i - 1."""
        return self.contract is not None and self.contract.logit_shift

    @property
    def is_writer(self) -> bool:
        """True on the rank that writes files and prints."""
        return parallel.is_writer()

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, samples: Sequence[int]
    ) -> list[Trajectory]:
        """One trajectory a prompt, in input order, on every rank.

        The prompts are shared out over the copies of the model by length; one without work is
        legal. Raises InputError for a prompt that leaves no room in the model's positions.
        """
        if decoding.mode == "diffusion" and self.contract is None:
            raise InputError(self.no_mask)
        requests = [
            Request(sample=sample, prompt=prompt, max_new_tokens=self._limit(prompt, decoding))
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        shares = split_over_replicas(requests, parallel.generators(), decoding)
        mine = shares[parallel.generator_rank()]
        made = generate(
            self.model,
            [requests[i] for i in mine],
            decoding,
            self.vocabulary,
            key=(decoding.seed, 0),
            slots=SLOTS,
        )
        pairs = list(zip(mine, made.trajectories, strict=True))
        done = dict(parallel.gather_objects_over_generators(pairs))
        return [done[i] for i in range(len(requests))]

    def _limit(self, prompt: Prompt, decoding: Decoding) -> int:
        foreign = next((i for i in prompt.ids if not 0 <= i < self.vocabulary.size), None)
        if foreign is not None:
            raise InputError(
                f"prompt {prompt.index} holds id {foreign}; use ids from 0 to "
                f"{self.vocabulary.size - 1}, the model's vocabulary"
            )
        room = self.longest - len(prompt.ids)
        if room < 1:
            raise InputError(
                f"prompt {prompt.index} has {len(prompt.ids)} tokens, but the model has "
                f"{self.longest} positions; shorten it"
            )
        return min(decoding.max_new_tokens, room)


def load_generator(
    model_dir: Path, *, tp: int = 1, pp: int = 1, mask_token_id: int | None = None
) -> Generator:
    """Load a Hugging Face directory or a Megatron checkpoint; data parallelism takes what is left.

    Raises InputError for a directory that is no complete Qwen3, and for a layout that divides
    neither the ranks nor the model.
    """
    layout = Layout(tensor=tp, pipeline=pp)
    layout.data_parallel(int(os.environ.get("WORLD_SIZE", "1")))
    manifest = read_manifest(model_dir) if is_checkpoint(model_dir) else None
    files = huggingface_dir(model_dir)
    shape = read_shape(files)
    check_layout(shape, tp, pp, str(model_dir))
    if manifest is None:
        open_weights(model_dir, shape).close()
    vocabulary, contract, no_mask = _ids(files, manifest and manifest.block_contract, mask_token_id)
    hardware = parallel.init(layout)
    model = build_model(shape, layout, hardware.dtype, hardware, name=str(model_dir))
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
