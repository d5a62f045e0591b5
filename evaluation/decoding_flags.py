"""The decoding flags that ``evaluation.run`` and ``evaluation.sample`` share, and their checks.

Imports no torch.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm import launcher
from megatron_opdlm.diffusion.decoding import MODES, REMASKING, Decoding
from megatron_opdlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded. Data parallelism takes what tp and pp leave of the world size."""

    tp: int = 1  # ranks
    pp: int = 1  # ranks
    ep: int = 1  # ranks that share out the experts, among those that tp and pp leave
    mask_token_id: int | None = None  # None: the tokenizer's mask token, else 151669 where it fits


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
    group.add_argument("--ep", type=int, default=1, help="expert-parallel ranks of a mixture")
    group.add_argument(
        "--mask-token-id", type=int, default=None, help="for models whose tokenizer has no mask"
    )


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


def loading_from(args: argparse.Namespace) -> Loading:
    """Layout and mask id; the layout must fit the processes that the launcher started."""
    world = launcher.world_size()
    if min(args.tp, args.pp, args.ep) < 1:
        raise InputError(
            f"--tp {args.tp} --pp {args.pp} --ep {args.ep}: numbers of ranks; use 1 or more"
        )
    if world % (args.tp * args.pp):
        raise InputError(
            f"--tp {args.tp} --pp {args.pp}: their product {args.tp * args.pp} does not divide the "
            f"{world} started processes; start a multiple of {args.tp * args.pp} with torchrun"
        )
    copies = world // (args.tp * args.pp)
    if copies % args.ep:
        raise InputError(
            f"--ep {args.ep} does not divide the {copies} ranks that --tp {args.tp} --pp {args.pp} "
            f"leave of {world} started processes; start a multiple of {args.tp * args.pp * args.ep}"
        )
    if args.mask_token_id is not None and args.mask_token_id < 0:
        raise InputError(f"--mask-token-id {args.mask_token_id}: a token id; use 0 or more")
    return Loading(tp=args.tp, pp=args.pp, ep=args.ep, mask_token_id=args.mask_token_id)


def check_model(path: Path) -> None:
    """The least that can be said of a model directory before anything heavy is imported."""
    if not path.is_dir():
        raise InputError(
            f"--model {path}: no such directory; "
            "give a Hugging Face directory or a Megatron checkpoint"
        )
