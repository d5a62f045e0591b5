"""Files of model directories: reading, writing, publishing."""
