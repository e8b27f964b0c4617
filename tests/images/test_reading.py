"""Every kind of color image file: the colors that it shows, or an error that says why it has none."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from cameo.errors import DataError
from cameo.images import read_image


def saved(path: Path, image: Any, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(path: Path, kind: bytes, data: bytes) -> Path:
    """Put a chunk behind the header of a PNG file."""
    content = path.read_bytes()
    header = 8 + 25  # signature and IHDR
    path.write_bytes(content[:header] + png_chunk(kind, data) + content[header:])
    return path


def swapped_profile() -> bytes:
    """sRGB's profile with its red and green primaries exchanged, so that red means green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = (profile[entries[name] + 4 : entries[name] + 12] for name in (b"rXYZ", b"gXYZ"))
    profile[entries[b"rXYZ"] + 4 : entries[b"rXYZ"] + 12] = green
    profile[entries[b"gXYZ"] + 4 : entries[b"gXYZ"] + 12] = red
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (10, 20, 30), [10, 20, 30]),
        ("L", 77, [77, 77, 77]),
        ("1", 1, [255, 255, 255]),
        ("LA", (0, 51), [204, 204, 204]),  # black, a fifth opaque, on white
        ("RGBA", (200, 0, 100, 0), [255, 255, 255]),
        ("RGBA", (200, 0, 100, 255), [200, 0, 100]),
        ("RGBA", (255, 0, 0, 102), [255, 153, 153]),  # 0.4 red + 0.6 white
    ],
)
def test_modes_of_eight_bits(tmp_path: Path, mode: str, value: Any, expected: list[int]) -> None:
    image = read_image(saved(tmp_path / "a.png", Image.new(mode, (3, 2), value)))
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert (image == expected).all()


def test_sixteen_bits_of_gray_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("gray.png", "gray.tif"):
        image = read_image(saved(tmp_path / name, Image.fromarray(values)))
        assert image[0, :, 0].tolist() == [0, 1, 128, 255], name
        assert (image[..., 0] == image[..., 2]).all()


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    path = saved(tmp_path / "palette.png", image, transparency=0)
    assert read_image(path)[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert read_image(path, background=(0, 1, 0))[0].tolist() == [[0, 255, 0], [0, 0, 255]]


def test_no_background_refuses_transparent_pixels_alone(tmp_path: Path) -> None:
    opaque = saved(tmp_path / "opaque.png", Image.new("RGBA", (2, 2), (1, 2, 3, 255)))
    assert read_image(opaque, background=None)[0, 0].tolist() == [1, 2, 3]
    clear = Image.new("RGBA", (2, 2), (1, 2, 3, 255))
    clear.putpixel((0, 0), (1, 2, 3, 0))
    with pytest.raises(DataError, match=r"clear.png: 25.0% of the pixels are transparent.*background="):
        read_image(saved(tmp_path / "clear.png", clear), background=None)
    with pytest.raises(ValueError, match=r"background: expected three numbers in \[0, 1\] or None, got \(255, 0, 0\)"):
        read_image(opaque, background=(255, 0, 0))


def test_gamma_of_a_png(tmp_path: Path) -> None:
    linear = with_chunk(saved(tmp_path / "linear.png", Image.new("L", (1, 1), 55)), b"gAMA", struct.pack(">I", 100000))
    # 55 / 255 of the light: 255 * 0.2157 ** (1 / 2.2) = 127.
    assert read_image(linear)[0, 0].tolist() == [127, 127, 127]
    usual = with_chunk(saved(tmp_path / "usual.png", Image.new("L", (1, 1), 55)), b"gAMA", struct.pack(">I", 45455))
    assert read_image(usual)[0, 0].tolist() == [55, 55, 55]


def test_icc_profiles(tmp_path: Path) -> None:
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    odd = saved(tmp_path / "odd.png", red, icc_profile=swapped_profile())
    assert np.abs(read_image(odd)[0, 0].astype(int) - [0, 255, 0]).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    values = np.arange(30, dtype=np.uint8).reshape(2, 5, 3)
    assert (read_image(saved(tmp_path / "srgb.png", Image.fromarray(values), icc_profile=srgb)) == values).all()
    with pytest.warns(UserWarning, match=r"damaged.png: its ICC profile cannot be applied.*taken as sRGB"):
        image = read_image(saved(tmp_path / "damaged.png", red, icc_profile=b"no profile"))
    assert image[0, 0].tolist() == [255, 0, 0]


def test_alpha_is_kept_beside_a_profile(tmp_path: Path) -> None:
    image = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    path = saved(tmp_path / "clear.png", image, icc_profile=swapped_profile())
    assert read_image(path, background=(0, 0, 1))[0, 0].tolist() == [0, 0, 255]


def test_exif_orientation_is_told_and_not_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), (9, 9, 9))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = saved(tmp_path / "turned.png", image, exif=exif)
    with pytest.warns(UserWarning, match=r"images there have an EXIF orientation, which is not applied"):
        assert read_image(path).shape == (2, 4, 3)
    exif[0x0112] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(saved(tmp_path / "upright.png", image, exif=exif))


def test_what_has_no_eight_bit_colors_is_refused(tmp_path: Path) -> None:
    floats = saved(tmp_path / "floats.tif", Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)))
    with pytest.raises(DataError, match=r"floats.tif: expected an image of 8 or 16 bits, got one of mode 'F'"):
        read_image(floats)
    integers = saved(tmp_path / "integers.tif", Image.fromarray(np.full((2, 2), 7, dtype=np.int32)))
    with pytest.raises(DataError, match=r"integers.tif: .*got one of mode 'I'"):
        read_image(integers)
    with pytest.raises(DataError, match=r"inks.jpg: is CMYK, inks for a printer, without the profile.*convert it"):
        read_image(saved(tmp_path / "inks.jpg", Image.new("CMYK", (2, 2))))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animations_and_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    path = saved(tmp_path / f"moving.{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=rf"moving.{suffix}: expected one image, got 3 frames or pages"):
        read_image(path)


def test_the_first_picture_of_an_mpo_is_taken(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250))]
    path = saved(tmp_path / "phone.jpg", pictures[0], format="MPO", save_all=True, append_images=pictures[1:])
    assert np.abs(read_image(path)[4, 4].astype(int) - [250, 0, 0]).max() < 4


def test_files_that_cannot_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"absent.png: there is no such image file"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text.png: cannot decode the color image"):
        read_image(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    short = saved(tmp_path / "short.png", Image.fromarray(noise))
    short.write_bytes(short.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"short.png: cannot decode the color image"):
        read_image(short)
    large = saved(tmp_path / "large.png", Image.fromarray(noise))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        DataError, match=r"large.png: cannot decode the color image: more than 2,000 pixels.*scale it down"
    ):
        read_image(large)
