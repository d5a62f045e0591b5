"""What decoding needs of the device: the key/value cache and, for each group of slots, its state
and its passes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_opdlm import parallel
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.cache_budget import Room, open_cache
from megatron_opdlm.engine.decode_plans import BucketPlans, RowPlans
from megatron_opdlm.engine.passes import ExactPasses, FixedPasses
from megatron_opdlm.engine.slot_state import SlotState
from megatron_opdlm.hardware import Capture, select_hardware
from megatron_opdlm.model.decode_attention import RowKernel
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.records import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Group:
    """Slots that run together."""

    state: SlotState
    passes: ExactPasses | FixedPasses
    table: Tensor  # int32 [S + 1, pages of the longest sequence]
    pages: range  # of the cache; the last one is scratch


class Decoder:
    """A model ready to decode sequences in slots."""

    def __init__(
        self,
        model: LanguageModel,
        rules: Decoding,
        vocabulary: Vocabulary,
        room: Room,
        kernel: RowKernel | None,
        capture: Capture | None,
    ) -> None:
        """``kernel``: of block rows, None for buckets; ``capture``: None captures nothing."""
        self.model, self.rules, self.vocabulary, self.room = model, rules, vocabulary, room
        self.kernel, self.capture = kernel, capture
        self._weights = _places(model)
        self.device = select_hardware().device
        shares = _shares(room)
        self.cache = open_cache(model, room, scratch=len(shares))
        self.groups: list[Group] = []
        first = 0
        for slots, pages in shares:
            self.groups.append(self._group(slots, range(first, first + pages + 1)))
            first += pages + 1

    def _group(self, slots: int, pages: range) -> Group:
        state = SlotState(slots, self.room.positions, self.rules, self.vocabulary, self.device)
        table = torch.full(
            (slots + 1, self.room.pages_of_longest),
            pages[-1],
            dtype=torch.int32,
            device=self.device,
        )
        if self.kernel is None:
            plans = BucketPlans(self.cache, table, state, pages)
        else:
            plans = RowPlans(self.cache, table, self.rules.block_size, self.kernel)
        passes = (
            ExactPasses(self.model, state, plans)
            if self.capture is None
            else FixedPasses(self.model, state, plans, self.capture)
        )
        return Group(state=state, passes=passes, table=table, pages=pages)

    def serves(
        self,
        model: LanguageModel,
        rules: Decoding,
        vocabulary: Vocabulary,
        room: Room,
        kernel: RowKernel | None,
    ) -> bool:
        """Whether another one, made of these, would compute the same from the same memory. The
        threshold is told at every call.
        """
        return (
            self.model is model
            and replace(self.rules, threshold=rules.threshold) == rules
            and (self.vocabulary, self.room, self.kernel) == (vocabulary, room, kernel)
            and self._weights == _places(model)
        )


class DecoderKeeper:
    """Keeps a decoder, its cache and its captured passes from one rollout to the next."""

    def __init__(self) -> None:
        self._kept: Decoder | None = None

    def take(
        self,
        model: LanguageModel,
        rules: Decoding,
        vocabulary: Vocabulary,
        room: Room,
        kernel: RowKernel | None,
        captures: Callable[[], Capture] | None,
    ) -> Decoder:
        """The kept decoder if it serves, else a new one, made after the kept one's memory is free.
        It is kept again by ``keep`` only: after a failure nobody knows what it holds.
        """
        decoder, self._kept = self._kept, None
        arguments = model, rules, vocabulary, room, kernel
        serves = decoder is not None and decoder.serves(*arguments)
        # Capturing exchanges messages, so all ranks of the replica do it or none does.
        if parallel.least_over_replica(int(serves)) and decoder is not None:
            return decoder
        del decoder
        return Decoder(*arguments, captures() if captures else None)

    def keep(self, decoder: Decoder) -> None:
        """Keep one whose passes are captured; the others cost nothing to make."""
        if decoder.capture is not None:
            self._kept = decoder


def _places(model: LanguageModel) -> list[int]:
    """Addresses of the weights, which captured passes read there."""
    return [parameter.data_ptr() for parameter in model.parameters()]


def _shares(room: Room) -> list[tuple[int, int]]:
    """(slots, pages) of each group: as many groups as pipeline stages, if there is work for them.
    Ranks that keep step have all of them, if need be without slots.
    """
    stages = parallel.pipeline_size()
    groups = min(stages, room.slots, room.pages // room.pages_of_longest)
    shares = [(_part(room.slots, groups, i), _part(room.pages, groups, i)) for i in range(groups)]
    empty = stages - groups if parallel.expert_size() > 1 else 0
    return shares + [(0, 0)] * empty


def _part(whole: int, parts: int, number: int) -> int:
    """Size of a part, the first ones one larger where the whole does not divide."""
    return whole // parts + (number < whole % parts)
