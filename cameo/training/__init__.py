"""One training loop for all recipes: settings, data, checkpoints, loop."""
