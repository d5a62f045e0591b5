"""Measurements run by hand; results stand in docs/performance.md with their command."""
