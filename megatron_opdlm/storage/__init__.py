"""What lies on disk: model directories, run directories, the parts of a checkpoint."""
