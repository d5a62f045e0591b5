"""What only exports use: layouts, their files and code, the model card."""
