"""Launchers: shell scripts that start commands, and the package behind the quickstart."""
