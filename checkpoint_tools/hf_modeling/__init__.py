"""Files that an export carries; imported from the export, never from here."""
