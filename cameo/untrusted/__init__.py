"""Configurations and weights that somebody else may have written: read strictly, and bounded before memory is taken.

A model is built as large as its configuration says, so a configuration of a few bytes could ask for terabytes. What it
may ask for is bounded by `cameo.untrusted.asked.LIMITS`, and an adapter's ranks by the weights beside it.
"""
