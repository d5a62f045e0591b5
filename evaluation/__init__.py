"""Evaluation: generate with a model, grade the responses, report what was counted."""
