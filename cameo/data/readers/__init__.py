"""Readers of posed images: one file per format, each of which lists the frames of a scene without decoding them."""
