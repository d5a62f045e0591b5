"""Exports with quantised weights."""
