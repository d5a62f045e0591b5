"""States as packed rows."""
