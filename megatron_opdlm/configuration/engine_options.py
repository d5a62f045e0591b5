"""What the rollout engine may use of its machine. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from megatron_opdlm.keys import key


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """None of them changes what is generated."""

    slots: int = key(
        128,
        "sequences decoded at once on a data-parallel rank; others wait",
        unit="sequences",
        at_least=1,
        may_change=True,
    )
    kv_cache_tokens: int | None = key(
        None,
        "cached positions of all slots (with graphs kept between rollouts); null: half of the "
        "free memory",
        unit="tokens",
        at_least=1,
        may_change=True,
    )
    prefill_tokens: int = key(
        8192,
        "length of the prompts that join one forward; a longer one joins alone",
        unit="tokens",
        at_least=1,
        may_change=True,
    )
    attention: Literal["auto", "buckets", "rows", "triton", "flash"] = key(
        "auto",
        "what attends while decoding (model/decode_choice.py): windows of similar length, or rows "
        "of a block by PyTorch, our Triton kernel or flash-attn; auto: on GPUs the first of "
        "triton, flash and rows that can run, else buckets",
        may_change=True,
    )
    graphs: bool = key(
        True, "capture the passes of rows in graphs and replay them, on GPUs", may_change=True
    )
