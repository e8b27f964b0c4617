"""The language of token layouts: patterns, the lengths of their axes, tokens of no view, and the order of views."""
