"""How to decode: the one record of generation settings. Sections of the configuration extend it,
command lines and recipes of evaluations are made from its fields. Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from megatron_opdlm.keys import check, key

# A test holds them equal to denoising.REMASKING, which needs torch.
Remasking = Literal[
    "low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"
]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn and committed, and how many."""

    remasking: Remasking = key(
        "low_confidence_static", "which drawn tokens a pass commits (docs/evaluation.md)"
    )
    threshold: float = key(
        0.9,
        "low_confidence_dynamic commits tokens strictly above it",
        unit="probability",
        at_least=0,
        at_most=1,
    )
    entropy_bound: float = key(
        0.35, "entropy_bounded commits up to it, summed over a pass", unit="nats", at_least=0
    )
    temperature: float = key(0.0, "of the distribution that is drawn from; 0: arg-max", at_least=0)
    top_p: float = key(
        1.0,
        "mass of the likeliest tokens that is kept; 1: all",
        unit="probability",
        above=0,
        at_most=1,
    )
    top_k: int = key(
        0, "number of the likeliest tokens that are kept; 0: all", unit="tokens", at_least=0
    )
    max_new_tokens: int = key(2048, "length limit of a response", unit="tokens", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Decoding(Sampling):
    """Settings of one generation. ``mode="ar"`` reads temperature, top-p, top-k, the length limit
    and the seed only.
    """

    mode: Literal["diffusion", "ar"] = key("diffusion", "in blocks, or token by token")
    block_size: int = key(4, "size of a block", unit="tokens", at_least=1)
    denoising_steps: int = key(
        4, "passes in which a block is finished at the latest", unit="passes", at_least=1
    )
    seed: int = key(0, "part of the key of every random draw", at_least=0)
    logit_shift: bool = key(False, "position i is read from logits i - 1; the model's own")
    margins: bool = key(False, "record the margin of each committed token; changes no token")

    @classmethod
    def of(cls, section: Sampling, **others: Any) -> Self:
        """The settings that a section of the configuration holds, and ``others``."""
        names = {item.name for item in fields(cls)} & {item.name for item in fields(section)}
        return cls(**{**{name: getattr(section, name) for name in names}, **others}).validate()

    def validate(self, shown: Callable[[str], str] = str) -> Self:
        """Check every value; returns itself so that it can be chained. InputError: value and
        rule. ``shown``: what users call a field.
        """
        for item in fields(self):
            check(type(self), item.name, getattr(self, item.name), shown(item.name))
        return self

    @property
    def asked(self) -> Mapping[str, Any]:
        """What decides the tokens and users ask for: without the logit shift, which is the model's
        own, and what is recorded.
        """
        return {name: getattr(self, name) for name in ASKED}

    def autoregressive(self) -> Self:
        """The same sampling as blocks of one token: one pass, logits from the position before."""
        return replace(
            self,
            block_size=1,
            denoising_steps=1,
            remasking="low_confidence_static",
            logit_shift=True,
        )


NOT_ASKED = ("logit_shift", "margins")
ASKED = tuple(item.name for item in fields(Decoding) if item.name not in NOT_ASKED)
