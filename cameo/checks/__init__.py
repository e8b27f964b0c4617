"""Checks that a model's attention is what its supervision takes it for."""
