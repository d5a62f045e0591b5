"""Figures of a step on their way to people."""
