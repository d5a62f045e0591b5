"""Responses of a model to the problems of tasks, resumable."""
