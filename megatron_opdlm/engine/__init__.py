"""Parts of the rollout engine."""
