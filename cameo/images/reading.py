"""One way to decode a color image: sRGB in 8 bits, without transparency, with an error for what has no such form.

Axes: H W pixels.
"""

from __future__ import annotations

import io
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np

from cameo.errors import DataError
from cameo.files import open_plain

__all__ = ["decode", "open_image", "read_image", "to_rgb", "to_rgba"]

Array = np.ndarray
WHITE = (1.0, 1.0, 1.0)
# Exponent of the encoded values of sRGB and of nearly all files: light ** (1 / 2.2).
GAMMA = 1 / 2.2
GAMMA_TOLERANCE = 0.02
ORIENTATION_TAG = 0x0112
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
# Formats that Pillow decodes by itself. Of others it hands some to programs, as PostScript to Ghostscript, whatever the
# ending of the file is.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Modes of Pillow that hold a color or gray value in 8 bits, with or without an alpha channel or a palette.
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")


def read_image(path: str | Path, *, background: tuple[float, float, float] | None = WHITE) -> Array:
    """Decode a color image file to uint8 `[H, W, 3]`, as a viewer on a plain background shows it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> path = Path(tempfile.mkdtemp()) / "clear.png"
        >>> Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(path)  # red, but fully transparent
        >>> read_image(path)[0, 0].tolist(), read_image(path, background=(0, 0, 0))[0, 0].tolist()
        ([255, 255, 255], [0, 0, 0])

    - Gray, palette and 1-bit images become RGB; 16 bits of gray are scaled to 8, 65535 being white.
    - Transparent pixels are blended with the background, in the encoded values, as viewers do.
    - An ICC profile or a PNG gamma other than sRGB's is applied: the result is sRGB.
    - An EXIF orientation is not applied, with a warning: cameras and depth belong to the pixels as stored.

    Args:
        path: a file that Pillow reads, as PNG, JPEG, WebP or TIFF.
        background: color behind transparent pixels, sRGB in [0, 1]; white by default, as behind embedded objects. None
            refuses an image in which any pixel is transparent.

    Raises:
        DataError: that names the file, if it is missing, cannot be decoded, has too many pixels, holds several frames,
            is CMYK without a profile, has another form without 8-bit colors (float or 32-bit values, Lab), or has
            transparent pixels with `background=None`.
        ValueError: if the background is no color.
    """
    path = Path(path)
    if background is not None and not (len(background) == 3 and all(0 <= value <= 1 for value in background)):
        raise ValueError(f"background: expected three numbers in [0, 1] or None, got {background}")
    image = decode(path, str(path))
    if image.getexif().get(ORIENTATION_TAG, 1) not in (0, 1):
        warnings.warn(
            f"{path.parent}: images there have an EXIF orientation, which is not applied, since cameras and depth "
            "belong to the pixels as they are stored; turn the files themselves, with their cameras, to have them "
            "upright",
            stacklevel=2,
        )
    return to_rgb(image, str(path), background)


def to_rgb(image: Any, name: str, background: tuple[float, float, float] | None) -> Array:
    """Convert a Pillow image of any mode to sRGB, uint8 `[H, W, 3]`; see `read_image` for what becomes of which.

    Example:
        >>> from PIL import Image
        >>> to_rgb(Image.new("LA", (1, 1), (0, 51)), "shade", (1.0, 1.0, 1.0)).tolist()
        [[[204, 204, 204]]]

    Args:
        image: of any mode.
        name: what errors and warnings call it, usually its path.
        background: color behind transparent pixels, sRGB in [0, 1]; None refuses an image that has any.

    Raises:
        DataError: for a mode without 8-bit colors, for CMYK without a profile, and for transparent pixels without a
            background.
    """
    rgba = to_rgba(image, name)
    alpha = rgba[..., 3]
    if (alpha == 255).all():
        return np.ascontiguousarray(rgba[..., :3])
    if background is None:
        raise DataError(
            f"{name}: {np.mean(alpha < 255):.1%} of the pixels are transparent, and their colors are not to be seen; "
            "blend the image with a background, or pass background="
        )
    share = alpha[..., None].astype(np.float64) / 255
    behind = np.array(background, dtype=np.float64) * 255
    return np.rint(rgba[..., :3] * share + behind * (1 - share)).astype(np.uint8)


def to_rgba(image: Any, name: str) -> Array:
    """Convert a Pillow image to sRGB with alpha, uint8 `[H, W, 4]`.

    Example:
        >>> from PIL import Image
        >>> to_rgba(Image.new("LA", (1, 1), (10, 200)), "shade").tolist()
        [[[10, 10, 10, 200]]]

    Args:
        image: of any mode.
        name: what errors and warnings call it, usually its path.

    Raises:
        DataError: for a mode without 8-bit colors, and for CMYK without a profile.
    """
    from PIL import Image

    if image.format not in (None, *FORMATS):
        raise DataError(f"{name}: expected an image as PNG or JPEG, got {image.format}; convert it")
    profile, gamma = image.info.get("icc_profile"), image.info.get("gamma")
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion cuts every value off at 255.
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8))
    elif image.mode == "CMYK":
        if not profile:
            raise DataError(
                f"{name}: is CMYK, inks for a printer, without the profile that says which; convert it to an RGB image"
            )
        return _opaque(_by_profile(image, profile, name))
    elif image.mode not in EIGHT_BITS:
        raise DataError(
            f"{name}: expected an image of 8 or 16 bits, got one of mode {image.mode!r}, whose values have no agreed "
            "range; convert it to an 8-bit RGB image"
        )
    rgba = np.array(image.convert("RGBA"))
    if profile:
        rgba[..., :3] = _by_profile(Image.fromarray(rgba[..., :3]), profile, name)
    elif gamma:
        rgba[..., :3] = _by_gamma(rgba[..., :3], gamma)
    return rgba


def open_image(stream: IO[bytes]) -> Any:
    """Open an image as Pillow does, but only in a format that Pillow decodes by itself.

    Raises:
        OSError: if it is none; and what Pillow raises.
    """
    from PIL import Image

    Image.init()
    return Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])


def decode(source: Path | IO[bytes], name: str, kind: str = "color") -> Any:
    """Decode the one image of a file, or of an open one, as Pillow has it.

    Args:
        source: path, or stream at the beginning of the file.
        name: what errors call it, usually its path.
        kind: what it shows, for errors.

    Raises:
        DataError: for a file that is missing, no image, cut short, of too many pixels or of several frames.
    """
    from PIL import Image

    limit = f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    try:
        with (
            open_plain(source) if isinstance(source, Path) else nullcontext(source) as stream,
            open_image(stream) as file,
        ):
            # The further pictures of a phone's or a stereo camera's JPEG (MPO) are not frames of an animation.
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            if frames > 1:
                raise DataError(f"{name}: expected one image, got {frames} frames or pages; save one image per file")
            file.load()
            image = file.copy()
            image.format = file.format  # which a copy lacks
            return image
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such image file") from None
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: cannot decode the {kind} image: {limit} ({error}); scale it down, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name}: cannot decode the {kind} image ({error}); replace it by the original") from error


def _by_profile(image: Any, profile: bytes, name: str) -> Array:
    """Convert colors from an ICC profile to sRGB, uint8 `[H, W, 3]`; those that are sRGB keep their bits."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and source.profile.xcolor_space.strip() == "GRAY":
            image = image.convert("L")
        elif image.mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return np.array(image)
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        if image.mode == "CMYK":
            raise DataError(f"{name}: its ICC profile cannot be applied ({error}); convert it to RGB") from error
        warnings.warn(f"{name}: its ICC profile cannot be applied ({error}); taken as sRGB", stacklevel=4)
        return np.array(image.convert("RGB"))
    return np.array(converted)


def _by_gamma(colors: Array, gamma: float) -> Array:
    """Convert values that are light to the power `gamma` to sRGB's usual 1 / 2.2."""
    if not 0 < gamma < 10 or abs(gamma - GAMMA) < GAMMA_TOLERANCE:
        return colors
    table = np.rint(255 * (np.arange(256) / 255) ** (GAMMA / gamma)).astype(np.uint8)
    return table[colors]


def _opaque(colors: Array) -> Array:
    return np.concatenate([colors, np.full_like(colors[..., :1], 255)], axis=-1)
