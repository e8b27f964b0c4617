"""The version of this release, as it is written into saved files."""

__version__ = "0.1.0"
