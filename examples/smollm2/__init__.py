"""A real language model on two cores: run.sh."""
