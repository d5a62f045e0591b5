"""Who may attend to whom. One predicate a case; attention kernels only materialise it.

Tokens are described by tensors that broadcast against each other: ``block`` (absolute position //
B), ``clean`` (bool, False for the noisy copy). All predicates speak of two tokens of the same
sequence and return True where the query sees the key.
"""

from torch import Tensor

TRUNK = -1  # branch of tokens that several sequences begin with


def two_stream_visible(
    query_block: Tensor, query_clean: Tensor, key_block: Tensor, key_clean: Tensor
) -> Tensor:
    """Training mask of [prompt | clean response | noisy response] (DESIGN 2).

    A clean key is seen from later blocks by everyone and from its own block by clean queries; a
    noisy key is seen from its own block by noisy queries.
    """
    same = key_block == query_block
    return (key_clean & ((key_block < query_block) | (query_clean & same))) | (
        ~query_clean & ~key_clean & same
    )


def branch_visible(query_branch: Tensor, key_branch: Tensor) -> Tensor:
    """Sequences with a common beginning that is packed once: everyone sees what is common to all
    (``TRUNK``) and what is on its own branch. Holds beside another predicate; the trunk comes first
    there, so it sees no branch.
    """
    return (key_branch == TRUNK) | (key_branch == query_branch)


def block_causal_visible(query_position: Tensor, key_position: Tensor, block_size: int) -> Tensor:
    """Decoding mask over a cache indexed by absolute position: everything up to the end of the
    query's block.

    With ``block_size`` 1 this is the causal mask, which is all that the teacher and autoregressive
    decoding need. What a cache holds beyond the query's block is stale, and hidden by the same
    comparison.
    """
    return key_position // block_size <= query_position // block_size
