"""The decoding flags that ``evaluation.run`` and ``evaluation.sample`` share, and their checks.

Imports no torch.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm.diffusion.decoding import MODES, REMASKING, Decoding
from megatron_opdlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks a model is spread over. Data parallelism takes what is left of the world size."""

    tp: int = 1
    pp: int = 1


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Add the contract's decoding flags.

    Names are checked in ``decoding_from``, so that errors look the same everywhere.
    """
    default = Decoding()
    group = parser.add_argument_group("decoding")
    group.add_argument("--mode", default=default.mode, metavar="|".join(MODES), help="diffusion")
    group.add_argument("--block-size", type=int, default=default.block_size, help="tokens")
    group.add_argument(
        "--denoising-steps", type=int, default=default.denoising_steps, help="passes per block"
    )
    group.add_argument("--remasking", default=default.remasking, metavar="|".join(REMASKING))
    group.add_argument(
        "--threshold",
        type=float,
        default=default.threshold,
        help="probability above which low_confidence_dynamic commits",
    )
    group.add_argument(
        "--entropy-bound", type=float, default=default.entropy_bound, help="nats, entropy_bounded"
    )
    group.add_argument("--temperature", type=float, default=default.temperature, help="0: arg-max")
    group.add_argument("--top-p", type=float, default=default.top_p, help="1: keep all")
    group.add_argument("--top-k", type=int, default=default.top_k, help="0: keep all")
    group.add_argument(
        "--max-new-tokens", type=int, default=default.max_new_tokens, help="response tokens"
    )
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    group.add_argument("--pp", type=int, default=1, help="pipeline-parallel ranks")


def decoding_from(args: argparse.Namespace) -> Decoding:
    """The validated settings.

    Logit shift is not a flag: the model directory records it (``Generator.logit_shift``).
    """
    return Decoding(
        mode=args.mode,
        block_size=args.block_size,
        denoising_steps=args.denoising_steps,
        remasking=args.remasking,
        threshold=args.threshold,
        entropy_bound=args.entropy_bound,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    ).validate()


def layout_from(args: argparse.Namespace) -> Layout:
    """The layout, checked against the number of processes that the launcher started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tp < 1 or args.pp < 1:
        raise InputError(f"--tp {args.tp} --pp {args.pp}: numbers of ranks; use 1 or more")
    if world % (args.tp * args.pp):
        raise InputError(
            f"--tp {args.tp} --pp {args.pp}: their product {args.tp * args.pp} does not divide the "
            f"{world} started processes; start a multiple of {args.tp * args.pp} with torchrun"
        )
    return Layout(tp=args.tp, pp=args.pp)


def check_model(path: Path) -> None:
    """The least that can be said of a model directory before anything heavy is imported."""
    if not path.is_dir():
        raise InputError(
            f"--model {path}: no such directory; "
            "give a Hugging Face directory or a Megatron checkpoint"
        )
