"""Sequences that begin alike, packed as a tree: the common beginning once, then the rest of each.

Responses to one prompt need its keys and values once: what stands before the first token in which
they differ cannot see that token. A tree is attended as one sequence whose tokens also tell the
branch they are on (``diffusion/masks.py``): losses and gradients are those of the sequences alone.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from megatron_opdlm.diffusion.masks import TRUNK

# A beginning is shared if it is at least this share of what follows it: below, a row becomes one
# long sequence for little.
WORTH = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One sequence's part of a row. n tokens, m reads; clean tokens come first. On the host, where
    numpy handles so many small arrays faster.
    """

    tokens: ndarray  # [n]
    positions: ndarray  # [n]
    block: ndarray  # [n] whole blocks see each other
    clean: ndarray  # bool [n]
    read: ndarray  # [m] index within the piece


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Some pieces of a list, their common beginning packed once. n tokens."""

    members: list[int]  # places in the list
    tokens: ndarray  # [n]
    positions: ndarray  # [n]
    block: ndarray  # [n]
    clean: ndarray  # bool [n]
    branch: ndarray  # [n] place among the members, TRUNK for what all of them share
    read: list[ndarray]  # of each member [m], index within the tree


def grow(
    pieces: Sequence[Piece], prompts: Sequence[Hashable], capacity: int, *, share: bool
) -> list[Tree]:
    """Every piece in one tree. ``prompts``: only pieces with the same one are compared;
    ``capacity``: tokens that a tree of several pieces has at the most.
    """
    together: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        together.setdefault(prompt if share else place, []).append(place)
    return [
        _tree(pieces, members, shared)
        for alike in together.values()
        for members, shared in _groups(pieces, alike, capacity)
    ]


def is_worth_sharing(common: int, own: int) -> bool:
    """Whether a beginning of ``common`` tokens, before ``own`` others, is packed once."""
    return common > 0 and common >= WORTH * own


def _groups(
    pieces: Sequence[Piece], alike: Sequence[int], capacity: int
) -> Iterator[tuple[list[int], int]]:
    """(members, tokens of their common beginning), in order."""
    members, shared, size = [alike[0]], 0, len(pieces[alike[0]].tokens)
    for place in alike[1:]:
        piece = pieces[place]
        common = _common(pieces[members[0]], piece)
        common = common if len(members) == 1 else min(common, shared)
        joined = size + len(piece.tokens) - common + (shared - common) * (len(members) - 1)
        worth = is_worth_sharing(common, len(piece.tokens) - common)
        if worth and joined <= capacity:
            members, shared, size = [*members, place], common, joined
        else:
            yield members, shared
            members, shared, size = [place], 0, len(piece.tokens)
    yield members, shared


def _common(one: Piece, other: Piece) -> int:
    """Tokens of the whole clean blocks that both begin with."""
    most = min(int(one.clean.sum()), int(other.clean.sum()))
    differs = np.flatnonzero(one.tokens[:most] != other.tokens[:most])
    if not len(differs):
        return most
    return int(np.searchsorted(one.block[:most], one.block[differs[0]]))


def _tree(pieces: Sequence[Piece], members: list[int], shared: int) -> Tree:
    own = [pieces[place] for place in members]
    if len(own) == 1:
        return _alone(members, own[0])
    starts = [shared]
    for piece in own:
        starts.append(starts[-1] + len(piece.tokens) - shared)
    branch = np.repeat(
        [TRUNK, *range(len(own))], [shared, *(len(piece.tokens) - shared for piece in own)]
    )
    read = [
        np.where(piece.read < shared, piece.read, piece.read - shared + start)
        for piece, start in zip(own, starts, strict=False)
    ]

    def joined(field: str) -> ndarray:
        values = [getattr(piece, field) for piece in own]
        return np.concatenate([values[0][:shared], *(value[shared:] for value in values)])

    return Tree(
        members=members,
        tokens=joined("tokens"),
        positions=joined("positions"),
        block=joined("block"),
        clean=joined("clean"),
        branch=branch,
        read=read,
    )


def _alone(members: list[int], piece: Piece) -> Tree:
    """A tree of one member, whose tokens are all its own."""
    return Tree(
        members=members,
        tokens=piece.tokens,
        positions=piece.positions,
        block=piece.block,
        clean=piece.clean,
        branch=np.zeros(len(piece.tokens), np.int64),
        read=[piece.read],
    )
