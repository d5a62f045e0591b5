"""Training data before it is prompts: files, rows, checks."""
