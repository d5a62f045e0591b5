"""Weights on their way between formats, a tensor at a time, over all ranks."""
