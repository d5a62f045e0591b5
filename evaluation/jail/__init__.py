"""What runs around and inside a generated program (docs/sandbox.md)."""
