"""Block diffusion for the causal language models of transformers (>= 4.57, 5.x): the mask, and
``generate``. Every exported model class joins this with a family's class, whose weights and
layers it leaves alone.

``blocks.py``, ``denoising.py`` and ``randomness.py`` beside this file are the trainer's own, copied
at export, so that an exported model decodes by the very rules it was trained with.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .blocks import first_block_start, sequence_end  # pyright: ignore[reportMissingImports]
from .denoising import choose_commits, draw  # pyright: ignore[reportMissingImports]
from .fp8_linear import use_fp8_linears
from .randomness import DRAW_TOKEN, uniform  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class _Rules:
    """How one call of ``generate`` decodes."""

    steps: int  # passes per block
    threshold: float | None
    temperature: float
    top_k: int
    top_p: float
    seed: int

    @property
    def remasking(self) -> str:
        return "low_confidence_static" if self.threshold is None else "low_confidence_dynamic"


class BlockDiffusion:
    """What makes a causal language model of transformers a block-diffusion model. It stands before
    that model among the bases, whose ``forward`` takes a 4-D mask as it is.

    Attention is bidirectional unless a mask says otherwise. Where the export is quantised, the
    layers' linears are FP8 ones.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        use_fp8_linears(self)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> Any:
        """Logits of the token *at* each position (no shift).

        ``attention_mask``: 4-D [b, 1, q, k] is used as given (boolean: True = may attend; floating:
        added to the scores); 2-D [b, k] hides padding keys; None hides nothing. Keys include those
        of ``past_key_values``.
        """
        x = input_ids if inputs_embeds is None else inputs_embeds
        assert x is not None, "give input_ids or inputs_embeds"
        mask = self._additive_mask(attention_mask, x, past_key_values)
        return super().forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=past_key_values is not None if use_cache is None else use_cache,
            **kwargs,
        )

    def _additive_mask(self, mask: Tensor | None, x: Tensor, past: DynamicCache | None) -> Tensor:
        """Floating [b, 1, q, k]: what eager and SDPA attention take in every supported version."""
        rows, queries = x.shape[:2]
        if mask is not None and mask.dim() == 4 and mask.is_floating_point():
            return mask
        if mask is None:
            keys = queries + (past.get_seq_length() if past is not None else 0)
            visible = torch.ones(rows, 1, queries, keys, dtype=torch.bool, device=x.device)
        elif mask.dim() == 4:
            visible = mask.bool()
        else:
            visible = mask.bool()[:, None, None, :].expand(rows, 1, queries, mask.shape[-1])
        lowest = torch.finfo(self.dtype).min
        additive = torch.zeros(visible.shape, dtype=self.dtype, device=x.device)
        return additive.masked_fill(~visible, lowest)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 256,
        denoising_steps: int | None = None,
        threshold: float | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Decode block by block; returns prompt + response ids [b, <= P + max_new_tokens].

        ``input_ids`` [b, P] are unpadded rows of equal length. A block takes up to
        ``denoising_steps`` passes (default: one token a pass). ``threshold`` None commits the
        quota's most confident tokens of a pass; a number commits all above it too. Rows end after
        an end token (all of ``generation_config.eos_token_id``); shorter responses are filled with
        the pad token. A response ends with the model's positions (``max_position_embeddings``) at
        the latest. Temperature 0 is deterministic; else ``seed`` decides.
        """
        config = self.config
        steps = config.block_size if denoising_steps is None else denoising_steps
        rules = _Rules(steps, threshold, temperature, top_k, top_p, seed)
        self._check(input_ids, attention_mask, max_new_tokens, rules.steps)
        rows, prompt = input_ids.shape
        max_new_tokens = min(max_new_tokens, config.max_position_embeddings - prompt)
        start = first_block_start(prompt, config.block_size)
        end = sequence_end(prompt, max_new_tokens, config.block_size)
        ids = input_ids.new_full((rows, end), config.mask_token_id)
        ids[:, :prompt] = input_ids
        going = torch.ones(rows, dtype=torch.bool, device=ids.device)
        cache = DynamicCache()
        for left in range(start, end, config.block_size):
            ids[~going, left:] = self._pad_id()
            right = left + config.block_size
            masked = going[:, None] & (torch.arange(left, right, device=ids.device) >= prompt)
            self._decode_block(ids[:, :right], masked, cache, rules)
            going &= ~self._is_end(ids[:, max(prompt, left) : right]).any(1)
            if not going.any():
                break
        return self._cut(ids, prompt, max_new_tokens)

    def _decode_block(
        self, ids: Tensor, masked: Tensor, cache: DynamicCache, rules: _Rules
    ) -> None:
        """Fill the last block of ``ids`` [b, n] in place where ``masked`` [b, B].

        The first pass also brings into the cache what is clean but not there yet (the prompt, or
        the block before), so committing a block costs no pass of its own.
        """
        rows, size = masked.shape
        left = ids.shape[1] - size
        position = torch.arange(left, ids.shape[1], device=ids.device)
        sample = torch.arange(rows, device=ids.device)[:, None]
        cached = cache.get_seq_length()
        for number in range(rules.steps):
            logits = self._block_logits(ids[:, cached:], cached, cache)
            cache.crop(-size)  # the block is not final; everything before it is
            cached = left
            keys = (rules.seed, 0, sample, position, number, DRAW_TOKEN)
            drawn = draw(
                logits.flatten(0, 1),
                uniform(*keys, device=ids.device).flatten(),
                temperature=rules.temperature,
                top_k=rules.top_k,
                top_p=rules.top_p,
                with_entropy=rules.remasking == "entropy_bounded",
            )
            commit = choose_commits(
                drawn.confidence.view(rows, size),
                drawn.entropy.view(rows, size),
                masked,
                torch.full((rows,), number, device=ids.device),
                steps=rules.steps,
                remasking=rules.remasking,
                threshold=rules.threshold or 0.0,
            )
            ids[:, left:][commit] = drawn.token.view(rows, size)[commit]
            masked = masked & ~commit
            if not masked.any():
                return

    def _block_logits(self, ids: Tensor, offset: int, cache: DynamicCache) -> Tensor:
        """Logits [b, B, V] of the last block of ``ids``, which start at position ``offset``;
        forbidden ids are -inf.

        Every token sees its own block and all earlier ones.
        """
        size = self.config.block_size
        key = torch.arange(offset + ids.shape[1], device=ids.device)
        query = key[offset:]
        visible = key[None, :] // size <= query[:, None] // size
        output = self.forward(
            input_ids=ids.long(),
            attention_mask=visible[None, None].expand(ids.shape[0], 1, -1, -1),
            position_ids=query[None].expand(ids.shape[0], -1).long(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=size,
        )
        assert output.logits is not None
        logits = output.logits.float()
        for first, stop in self.config.forbidden_ids:
            logits[..., first:stop] = -torch.inf
        return logits

    def _cut(self, ids: Tensor, prompt: int, max_new_tokens: int) -> Tensor:
        """The first ``max_new_tokens`` of each response through its first end token, then pad; as
        short as possible.
        """
        response = ids[:, prompt : prompt + max_new_tokens].clone()
        ended = self._is_end(response).long()
        after = ended.cumsum(1) - ended > 0
        response[after] = self._pad_id()
        longest = int((~after).sum(1).max())
        return torch.cat([ids[:, :prompt], response[:, :longest]], dim=1)

    def _is_end(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(self._end_ids(), device=ids.device, dtype=ids.dtype))

    def _end_ids(self) -> list[int]:
        found = self.generation_config.eos_token_id
        return list(found) if isinstance(found, list | tuple) else [] if found is None else [found]

    def _pad_id(self) -> int:
        found = self.generation_config.pad_token_id
        return found if found is not None else next(iter(self._end_ids()), 0)

    def _check(
        self, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, steps: int
    ) -> None:
        config = self.config
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            raise ValueError("attention_mask hides tokens; give unpadded rows of equal length")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has {input_ids.dim()} dimensions; give [rows, tokens]")
        if input_ids.shape[1] >= config.max_position_embeddings:
            raise ValueError(
                f"the prompt has {input_ids.shape[1]} tokens, but the model has "
                f"{config.max_position_embeddings} positions; shorten it"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}; use 1 or more")
        if steps < 1:
            raise ValueError(f"denoising_steps={steps}; use 1 or more")
        contract = (config.logit_shift, config.block_alignment, config.clean_context)
        if contract != (False, "absolute", "block_causal"):
            raise ValueError(
                f"logit_shift={contract[0]}, block_alignment={contract[1]!r}, clean_context="
                f"{contract[2]!r}: this decoder reads unshifted logits in blocks counted from "
                "position 0, whose clean tokens see their whole block"
            )


__all__ = ["BlockDiffusion"]
