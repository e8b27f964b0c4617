"""Color image files, decoded to the colors that they show."""

from cameo.images.reading import read_image, to_rgba

__all__ = ["read_image", "to_rgba"]
