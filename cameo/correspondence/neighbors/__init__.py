"""Exact nearest neighbours with the cycle check: in plain torch, and in Triton."""
