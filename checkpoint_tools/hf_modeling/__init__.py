"""Files that an ``a2d-qwen3`` export carries; imported from the export, never from here."""
