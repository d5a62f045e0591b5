"""How a job notices that it must end, and how it ends."""
