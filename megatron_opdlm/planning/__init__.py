"""What is decided before anything is built: layouts, memory, shares of the work."""
