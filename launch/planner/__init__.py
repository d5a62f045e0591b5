"""Plans a run on GPUs that are not here: memory, hours, layouts."""
