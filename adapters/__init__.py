"""Adapters for the backbones that ship with cameo; each registers through the entry points `cameo.backbones`."""
