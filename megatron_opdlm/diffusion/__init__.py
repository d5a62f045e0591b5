"""The mathematics of block diffusion in plain torch: blocks, masks, denoising, keyed randomness. No
Megatron in here.
"""
