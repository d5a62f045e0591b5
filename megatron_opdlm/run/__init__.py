"""A run: its session, how it opens and ends early, its directory, lock and provenance."""
