"""Attention layers inside of code that `torch.compile` has compiled: seen in its graph, or run without it."""
