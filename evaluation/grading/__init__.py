"""Grading: pure functions from a response text to what is compared and the verdict."""
