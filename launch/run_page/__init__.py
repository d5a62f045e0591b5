"""A run's numbers and trajectories as one page for a browser."""
