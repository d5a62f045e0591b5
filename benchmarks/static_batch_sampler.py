"""A straightforward cached block-diffusion sampler: what the rollout engine is measured against.

It does what one writes first: a static batch, its prompts prefilled at the length of the longest;
for every block T denoising passes, each on a copy of the cache, then one more forward that commits
the block; every forward ends in logits of all its positions, as a model's forward does; the batch
runs until its longest response ends. Same model, same kernels, same draws and same tokens as the
engine (a test holds it), greedy or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion import denoising, randomness
from megatron_opdlm.diffusion.blocks import first_block_start
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.slots import Request
from megatron_opdlm.model.attention_plan import cached_plan
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model.kv_cache import KVCache
from megatron_opdlm.model.vocab_parallel import project
from megatron_opdlm.records import Vocabulary


@dataclass
class StaticResult:
    """Responses in whole blocks, and the forwards that the batches took."""

    responses: list[list[int]]
    forwards: int


@torch.inference_mode()
def sample_static(
    model: LanguageModel,
    requests: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary,
    *,
    key: tuple[int, int],
    batch_size: int,
) -> StaticResult:
    """Decode the requests batch after batch, on one rank, without shifted logits."""
    result = StaticResult([], 0)
    model.eval()
    for first in range(0, len(requests), batch_size):
        batch = _Batch(model, requests[first : first + batch_size], decoding, vocabulary, key)
        result.responses += batch.run()
        result.forwards += batch.forwards
    return result


class _Batch:
    """One static batch; b rows, B tokens per block."""

    def __init__(
        self,
        model: LanguageModel,
        requests: Sequence[Request],
        rules: Decoding,
        vocabulary: Vocabulary,
        key: tuple[int, int],
    ) -> None:
        self.model, self.requests, self.rules = model, requests, rules
        self.vocabulary, self.key, self.forwards = vocabulary, key, 0
        block = rules.block_size
        self.prompt = torch.tensor([len(r.prompt.ids) for r in requests])
        self.start = torch.tensor([first_block_start(len(r.prompt.ids), block) for r in requests])
        self.end = torch.tensor([request.positions(block) for request in requests])
        self.sample = torch.tensor([request.sample for request in requests])
        self.blocks = int((self.end - self.start).max()) // block
        positions = int(self.start.max()) + self.blocks * block
        self.tokens = torch.full((len(requests), positions), vocabulary.mask_id)
        for row, request in enumerate(requests):
            self.tokens[row, : len(request.prompt.ids)] = torch.tensor(request.prompt.ids)
        self.ended = torch.zeros(len(requests), dtype=torch.bool)
        self.forbidden = model.shard.columns_of(vocabulary.forbidden_ids, torch.device("cpu"))
        self.cache = KVCache(
            layer_numbers=model.layer_numbers,
            pages=len(requests),
            page_tokens=positions,
            groups=model.shape.groups,
            head_dim=model.shape.head_dim,
            dtype=model.config.params_dtype,
            device=torch.device("cpu"),
        )

    def run(self) -> list[list[int]]:
        """Prefill, then block after block until the longest response has ended."""
        longest = int(self.start.max())
        if longest:
            self._forward(self.cache, torch.zeros_like(self.start), longest)
        lengths = self.end - self.prompt
        for number in range(self.blocks):
            start = self.start + number * self.rules.block_size
            self._denoise(start)
            self._forward(self.cache, start, self.rules.block_size)  # commit
            lengths = self._note_ends(start, lengths)
            if bool((self.ended | (start + self.rules.block_size >= self.end)).all()):
                break
        return [
            self.tokens[row, prompt : prompt + length].tolist()
            for row, (prompt, length) in enumerate(
                zip(self.prompt.tolist(), lengths.tolist(), strict=True)
            )
        ]

    def _note_ends(self, start: Tensor, lengths: Tensor) -> Tensor:
        """Response lengths, cut at the end of the block that holds the first end token."""
        stop = start + self.rules.block_size
        position = start[:, None] + torch.arange(self.rules.block_size)
        tokens = self.tokens[torch.arange(len(start))[:, None], position]
        ends = torch.isin(tokens, torch.tensor(self.vocabulary.end_ids))
        hit = (ends & (position >= self.prompt[:, None])).any(1) & ~self.ended & (stop <= self.end)
        self.ended |= hit
        return torch.where(hit, stop - self.prompt, lengths)

    def _denoise(self, start: Tensor) -> None:
        rows = torch.arange(len(start))[:, None]
        position = start[:, None] + torch.arange(self.rules.block_size)
        masked = position >= self.prompt[:, None]
        for number in range(self.rules.denoising_steps):
            logits = self._forward(self.cache.copy(), start, self.rules.block_size)
            keys = (*self.key, self.sample[:, None], position, number, randomness.DRAW_TOKEN)
            drawn = denoising.draw(
                logits,
                randomness.uniform(*keys).flatten(),
                temperature=self.rules.temperature,
                top_k=self.rules.top_k,
                top_p=self.rules.top_p,
                with_entropy=self.rules.remasking == "entropy_bounded",
            )
            commit = denoising.choose_commits(
                drawn.confidence.view_as(position),
                drawn.entropy.view_as(position),
                masked,
                torch.full((len(start),), number),
                steps=self.rules.denoising_steps,
                remasking=self.rules.remasking,
                threshold=self.rules.threshold,
                entropy_bound=self.rules.entropy_bound,
            )
            current = self.tokens[rows, position]
            self.tokens[rows, position] = torch.where(
                commit, drawn.token.view_as(position), current
            )
            masked = masked & ~commit
            if not bool(masked.any()):
                return

    def _forward(self, cache: KVCache, start: Tensor, length: int) -> Tensor:
        """Logits [b * length, V] of the same number of tokens of every row."""
        self.forwards += 1
        rows = torch.arange(len(start))
        position = start[:, None] + torch.arange(length)
        tokens = self.tokens[rows[:, None], position].flatten()
        plan = cached_plan(
            torch.full_like(start, length),
            rows,
            position.flatten(),
            start + length,
            self.rules.block_size,
            cache,
            torch.device("cpu"),
        )
        hidden = self.model.run(tokens, position.flatten(), plan).flatten(0, 1)
        return project(hidden, self.model.head_weight, self.model.shard, self.forbidden)
