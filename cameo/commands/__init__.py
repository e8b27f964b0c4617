"""What users run, each command in a file of its own, with its settings, its help and its work."""
