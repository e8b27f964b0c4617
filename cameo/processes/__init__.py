"""The processes of a run: their launch, accelerator and trackers, what ends them, and how they watch each other."""
