"""Checkpoints of a training: safetensors and JSON with checksums, whole or absent, and never unpickled."""
