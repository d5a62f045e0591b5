"""The keys of config.json that say how a block-diffusion model was trained and must be decoded."""


class BlockContract:
    """Stands before a configuration class of transformers among the bases. The values come from
    config.json, where the export wrote them.
    """

    block_size = 4  # tokens; blocks are counted from absolute position 0
    mask_token_id = 151669
    forbidden_ids = ((151669, 151936),)  # never drawn; ranges [first, stop)
    block_alignment = "absolute"
    logit_shift = False  # the logits at a position are those of the token at that position
    clean_context = "block_causal"  # clean tokens see their whole block and everything before it

    def __getattr__(self, name: str) -> object:
        """``rope_theta`` also where transformers 5 keeps it in ``rope_parameters`` only: serving
        engines read the flat attribute, and take 10000 without it.
        """
        rope = self.__dict__.get("rope_parameters")
        if name == "rope_theta" and isinstance(rope, dict) and name in rope:
            return rope[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


__all__ = ["BlockContract"]
