"""The flags that say how to decode and how a model is loaded, made from the records that hold them.

Imports no torch.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_opdlm import keys, launcher
from megatron_opdlm.configuration.models import Precision
from megatron_opdlm.diffusion.decoding import ASKED, Decoding
from megatron_opdlm.errors import InputError
from megatron_opdlm.keys import key


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded. Data parallelism takes what tp and pp leave of the world size."""

    tp: int = key(1, "tensor-parallel ranks: they share every layer", at_least=1)
    pp: int = key(1, "pipeline-parallel ranks: they share out the layers", at_least=1)
    ep: int = key(
        1,
        "expert-parallel ranks: they share out the experts of a mixture, among those that tp and "
        "pp leave",
        at_least=1,
    )
    mask_token_id: int | None = key(
        None,
        "id of the mask token; without it the tokenizer's, else 151669 where it fits",
        at_least=0,
    )
    dtype: Precision = key(
        "auto", "type of the weights; auto: fp32 on a CPU, where bf16 is less exact, bf16 on a GPU"
    )


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Add the contract's decoding flags and those of ``add_loading_flags``."""
    _add_flags(parser.add_argument_group("decoding"), Decoding, ASKED)
    add_loading_flags(parser)


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add --tp, --pp, --ep, --mask-token-id and --dtype."""
    names = [item.name for item in fields(Loading)]
    _add_flags(parser.add_argument_group("loading"), Loading, names)


def _add_flags(group: Any, record: type, names: Iterable[str]) -> None:
    """A flag a field. Values are checked where the record is made, so that errors look the same
    everywhere.
    """
    default = record()
    for name in names:
        allowed = keys.choices(keys.types_of(record)[name])
        group.add_argument(
            flag(name),
            type=keys.plain_type(keys.types_of(record)[name]),
            default=getattr(default, name),
            metavar="|".join(allowed) or "N",
            help=keys.described(record, name),
        )


def flag(name: str) -> str:
    """Of a field: ``block_size`` -> ``--block-size``."""
    return "--" + name.replace("_", "-")


def decoding_from(args: argparse.Namespace) -> Decoding:
    """The validated settings.

    Logit shift is not a flag: the model directory records it (``Generator.logit_shift``).
    """
    return Decoding(**{name: getattr(args, name) for name in ASKED}).validate(flag)


def loading_from(args: argparse.Namespace) -> Loading:
    """Layout and mask id; the layout must fit the processes that the launcher started."""
    loading = Loading(**{item.name: getattr(args, item.name) for item in fields(Loading)})
    for item in fields(Loading):
        keys.check(Loading, item.name, getattr(loading, item.name), flag(item.name))
    tp, pp, ep = loading.tp, loading.pp, loading.ep
    world = launcher.world_size()
    if world % (tp * pp):
        raise InputError(
            f"--tp {tp} --pp {pp}: their product {tp * pp} does not divide the "
            f"{world} started processes; start a multiple of {tp * pp} with torchrun"
        )
    copies = world // (tp * pp)
    if copies % ep:
        raise InputError(
            f"--ep {ep} does not divide the {copies} ranks that --tp {tp} --pp {pp} "
            f"leave of {world} started processes; start a multiple of {tp * pp * ep}"
        )
    return loading


def check_model(path: Path) -> None:
    """The least that can be said of a model directory before anything heavy is imported."""
    if not path.is_dir():
        raise InputError(
            f"--model {path}: no such directory; "
            "give a Hugging Face directory or a Megatron checkpoint"
        )
