"""Draw the pictures of docs/check_data.md: what `check_views` says of a room, handed over right and with each mistake.

python -m benchmarks.correspondence.check_data_pictures
"""

from __future__ import annotations

import io

from PIL import Image

from benchmarks.common.page import PICTURES
from benchmarks.correspondence.check_data import FAULTS, RIGHT, rooms
from cameo.files import write_atomically
from cameo.inspection import check_views

# Name of the picture, and the mistake as the campaign names it.
DRAWN = {
    "right": RIGHT,
    "opengl": "OpenGL axes",
    "camera_to_world": "camera-to-world",
    "late_poses": "poses one frame late",
    "intrinsics": "intrinsics of twice the size",
    "millimeters": "depth x 1000",
    "ray_length": "ray length",
    "not_registered": "depth moved by 5 % of the width",
}
# Colors of a picture, which keep the files small.
COLORS = 128


def main() -> None:
    """Draw all pictures."""
    (room,) = rooms(0, 1, size=128)
    for name, fault in DRAWN.items():
        figure = check_views(FAULTS[fault][0](room)).figure(pairs=1)
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=100)
        image = Image.open(drawn).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        image.save(small, format="png", optimize=True)
        path = PICTURES / f"check_data_{name}.png"
        write_atomically(path, small.getvalue())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
