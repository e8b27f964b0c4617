"""The processes of a run: what was launched, their accelerator and trackers, and the signals that end them."""
