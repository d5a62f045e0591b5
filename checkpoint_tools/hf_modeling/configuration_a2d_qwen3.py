"""Configuration of a block-diffusion Qwen3: Qwen3's own keys and the block contract it was trained
under.
"""

from transformers import Qwen3Config


class A2DQwen3Config(Qwen3Config):
    """Qwen3's configuration; the keys below come from config.json, where the export wrote them."""

    model_type = "a2d-qwen3"

    block_size = 4  # tokens; blocks are counted from absolute position 0
    mask_token_id = 151669
    forbidden_ids = ((151669, 151936),)  # never drawn; ranges [first, stop)
    block_alignment = "absolute"
    logit_shift = False  # the logits at a position are those of the token at that position
    clean_context = "block_causal"  # clean tokens see their whole block and everything before it


__all__ = ["A2DQwen3Config"]
