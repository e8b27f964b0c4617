"""Backbone adapters, each a folder of the same files, registered by an entry point in `pyproject.toml`."""
