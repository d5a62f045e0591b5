"""What serving engines ask of a directory."""
