"""Scenes whose views are decoded when they are asked for, with a bounded number of them kept.

Axes: F views of a scene, H W pixels.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.correspondence.tracks import Tracks
from cameo.data.readers.files import StoredFile
from cameo.data.readers.frames import Format, Frame, Listing, ReadOptions, SceneFiles
from cameo.data.readers.images import check_image, output_intrinsics, output_points, read_color, read_depth
from cameo.errors import DataError, ShapeError, unknown_name
from cameo.geometry import check_cameras
from cameo.scenes.views import SceneCameras, Views

__all__ = ["LEAST_RANGE", "SPLITS", "PosedScenes"]

SPLITS = (None, "train", "validation")
# In meters; no depth camera measures a sequence in which nothing is farther away.
LEAST_RANGE = 0.1
# Scenes whose lists of frames are kept.
REMEMBERED_SCENES = 64


class PosedScenes:
    """Scenes of one format as a source: `len`, `views`, and `cameras`, `select` and `depth` for parts of a scene.

    Files are decoded when they are asked for; decoded views are kept up to `options.cache_bytes`, in each process that
    loads data. The frames of a scene are listed when the scene is first used, and then the headers of its images are
    compared with the cameras. Frames with an unusable pose or without a file are left out with a warning.

    With one scene `split` cuts its frames in time, with several it divides the scenes: "validation" is the last
    `holdout` part, "train" the rest.

    `format` is the name of the format, `reason` the files that showed it. Raises `DataError` that names the file or
    folder.
    """

    def __init__(
        self,
        form: Format,
        scenes: Sequence[SceneFiles],
        options: ReadOptions,
        *,
        split: str | None = None,
        holdout: float = 0.2,
        reason: str = "its class was named",
    ) -> None:
        _check_options(options, split, holdout)
        self.form, self.options, self.split, self.holdout = form, options, split, holdout
        self.format, self.reason = form.name, reason
        self._cuts_frames = len(scenes) == 1
        self.scenes = list(scenes) if self._cuts_frames else hold_out(list(scenes), split, holdout)
        if not self.scenes:
            raise DataError(f"split={split!r}, holdout={holdout} leaves none of {len(scenes)} scenes; give more scenes")
        self._opened: OrderedDict[int, _Scene] = OrderedDict()
        self._decoded = _Decoded(options.cache_bytes)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getstate__(self) -> dict[str, Any]:
        # What is decoded is not sent to another process.
        return {**self.__dict__, "_decoded": _Decoded(self.options.cache_bytes), "_opened": OrderedDict()}

    def cameras(self, scene: int) -> SceneCameras:
        """Return the cameras and tracks of all views of a scene; no image is decoded."""
        return self._scene(scene).cameras

    def views(self, scene: int = 0) -> Views:
        """Return all views of a scene: uint8 images, float32 depth (0 = none) and cameras."""
        views = self.select(scene, range(len(self.cameras(scene))))
        self._scene(scene).check_depth(views.depth.max().item())
        return views

    def select(self, scene: int, indices: Sequence[int]) -> Views:
        """Return some views of a scene in the given order; no others are decoded."""
        opened, indices = self._scene(scene), [int(index) for index in indices]
        if wrong := [index for index in indices if not 0 <= index < len(opened.frames)]:
            raise IndexError(f"indices: expected 0 to {len(opened.frames) - 1}, got {wrong[0]}")
        decoded = [self._decoded.get(scene, index, opened.frames[index], self.options) for index in indices]
        cameras = opened.cameras
        return Views(
            images=torch.stack([image for image, _ in decoded]),
            depth=torch.stack([depth for _, depth in decoded]),
            intrinsics=cameras.intrinsics[indices],
            extrinsics=cameras.extrinsics[indices],
            key=cameras.key,
            up=cameras.up,
            tracks=None if cameras.tracks is None else cameras.tracks.of_views(indices),
        )

    def depth(self, scene: int, index: int) -> Tensor:
        """Return the depth `[1, H, W]` of one view; its image is not decoded."""
        return read_depth(self._scene(scene).frames[index], self.options.size)

    def check_depth(self, scene: int, largest: float) -> bool:
        """Raise or warn where the largest depth of a scene says that its depth images are not what they should be."""
        return self._scene(scene).check_depth(largest)

    def names(self, scene: int) -> list[str]:
        """Return the names of the views of a scene, as its files have them."""
        return [frame.name for frame in self._scene(scene).frames]

    def is_undistorted(self, scene: int) -> bool:
        """Tell whether the lens distortion of any image of a scene is undone."""
        return any(frame.lens.model != "pinhole" for frame in self._scene(scene).frames)

    def fingerprint(self, scene: int) -> str:
        """Return hexadecimal digits that change with the cameras, the tracks and the content of the depth files."""
        return self._scene(scene).fingerprint(self.options)

    def _scene(self, number: int) -> _Scene:
        if not 0 <= number < len(self.scenes):
            only = "this is one scene (0)" if len(self.scenes) == 1 else f"expected 0 to {len(self.scenes) - 1}"
            raise IndexError(f"scene: {only}, got {number}")
        if number not in self._opened:
            listing = self.form.read(self.scenes[number], self.options)
            split = self.split if self._cuts_frames else None
            self._opened[number] = _Scene(self.scenes[number], listing, self.form, self.options, split, self.holdout)
            if len(self._opened) > REMEMBERED_SCENES:
                self._opened.popitem(last=False)
        return self._opened[number]


class _Scene:
    """The frames of one scene that are used, and their cameras at the size of the images returned."""

    def __init__(
        self, files: SceneFiles, listing: Listing, form: Format, options: ReadOptions, split: str | None, holdout: float
    ) -> None:
        self.where = f"{files.path}: {files.name}" if files.name else str(files.path)
        self.metric = listing.metric
        _report_dropped(self.where, listing, form)
        self.frames = hold_out(listing.frames, split, holdout)[:: options.stride]
        if not self.frames:
            raise DataError(
                f"{self.where}: split={split!r}, holdout={holdout} leaves none of {len(listing.frames)} frames"
            )
        self._check_given(options)
        for frame in self.frames:
            check_image(frame)
        self.has_depth = any(frame.depth is not None for frame in self.frames)
        try:
            self.cameras = self._cameras(files.key if split is None else f"{files.key}-{split}", listing, options)
        except ValueError as error:
            raise error if isinstance(error, DataError) else DataError(f"{self.where}: {error}") from error

    def _check_given(self, options: ReadOptions) -> None:
        """Check `intrinsics` as they were given, of which a lens keeps four numbers alone."""
        if options.intrinsics is None:
            return
        try:
            given = torch.from_numpy(options.intrinsics)[None, None]
            check_cameras(given, torch.eye(4, dtype=given.dtype)[None, None])
        except ValueError as error:
            raise DataError(f"{self.where}: {error}") from error

    def _cameras(self, key: str, listing: Listing, options: ReadOptions) -> SceneCameras:
        # Checked at full size and precision, before a small image could hide a fault.
        full = torch.from_numpy(np.stack([frame.lens.matrix for frame in self.frames]))
        exact = torch.from_numpy(np.stack([frame.extrinsics for frame in self.frames]))
        check_cameras(full[None], exact[None])
        return SceneCameras(
            intrinsics=torch.stack([output_intrinsics(frame.lens, options.size) for frame in self.frames]),
            extrinsics=exact.float(),
            size=options.size,
            key=key,
            up=None if listing.up is None else torch.as_tensor(listing.up, dtype=torch.float32),
            tracks=_tracks(self.frames, options.size),
            has_depth=self.has_depth,
        )

    def check_depth(self, largest: float) -> bool:
        """Return whether the largest depth is plausible; raises where there is none in files that should have it."""
        if not self.has_depth:
            return True
        if not largest > 0:
            first = next(frame.depth.file for frame in self.frames if frame.depth is not None)
            raise DataError(
                f"{self.where}: no frame has any depth measurement (first file: {first}); "
                "check that the depth images are the 16-bit originals"
            )
        if self.metric and largest < LEAST_RANGE:
            per_unit = next(frame.depth.per_unit for frame in self.frames if frame.depth is not None)
            warnings.warn(
                f"{self.where}: the largest depth of all frames is {largest:.3g} m with depth_scale={per_unit:g} "
                "units per meter; for depth stored in meters pass depth_scale=1",
                stacklevel=4,
            )
            return False
        return True

    def fingerprint(self, options: ReadOptions) -> str:
        cameras, digest = self.cameras, hashlib.sha256(repr((options.size, "overlap")).encode())
        for tensor in (cameras.intrinsics, cameras.extrinsics):
            digest.update(tensor.contiguous().numpy().tobytes())
        if cameras.tracks is not None:
            for tensor in (cameras.tracks.point, cameras.tracks.view):
                digest.update(tensor.numpy().tobytes())
        for frame in self.frames:
            digest.update(repr(frame.lens).encode())
            if frame.depth is not None:
                file, mask = frame.depth.file, frame.depth.mask
                digest.update(repr((frame.depth.per_unit, frame.depth.invalid, frame.depth.half_floats)).encode())
                digest.update(_content(file) + (b"" if mask is None else _content(mask)))
        return digest.hexdigest()[:32]


class _Decoded:
    """Decoded views, the most recently used first to stay, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._views: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, scene: int, index: int, frame: Frame, options: ReadOptions) -> tuple[Tensor, Tensor]:
        key = (scene, index)
        if key in self._views:
            self._views.move_to_end(key)
            return self._views[key]
        view = read_color(frame, options.size, options.background), read_depth(frame, options.size)
        self._views[key] = view
        self.bytes += sum(tensor.nbytes for tensor in view)
        while self.bytes > self.most_bytes and self._views:
            _, dropped = self._views.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in dropped)
        return view


def hold_out(items: list[Any], split: str | None, holdout: float) -> list[Any]:
    """Cut a sequence in time: neighboring frames look alike, so single held-out frames would leak.

    Example:
        >>> hold_out([0, 1, 2, 3], "validation", 0.25)
        [3]
    """
    if split is None:
        return items
    cut = len(items) - math.ceil(len(items) * holdout)
    return items[:cut] if split == "train" else items[cut:]


def _tracks(frames: list[Frame], size: tuple[int, int]) -> Tracks | None:
    if all(frame.sightings is None for frame in frames):
        return None
    points, views, places = [], [], []
    for view, frame in enumerate(frames):
        if frame.sightings is None or not len(frame.sightings.point):
            continue
        xy = output_points(frame.lens, size, frame.sightings.xy)
        kept = np.isfinite(xy).all(axis=1)
        points.append(frame.sightings.point[kept])
        places.append(xy[kept])
        views.append(np.full(int(kept.sum()), view))
    return Tracks(
        point=torch.from_numpy(np.concatenate([*points, np.zeros(0)]).astype(np.int64)),
        view=torch.from_numpy(np.concatenate([*views, np.zeros(0)]).astype(np.int64)),
        xy=torch.from_numpy(np.concatenate([*places, np.zeros((0, 2))]).astype(np.float32)),
        num_views=len(frames),
    )


def _report_dropped(where: str, listing: Listing, form: Format) -> None:
    if not listing.dropped:
        if not listing.frames:
            raise DataError(f"{where}: holds no frames; {form.name} needs {form.needs}")
        return
    name, reason = listing.dropped[0]
    total = len(listing.dropped) + len(listing.frames)
    message = f"{where}: {len(listing.dropped)} of {total} frames left out; first: {name} ({reason})"
    if not listing.frames:
        raise DataError(f"{message}. No usable frame is left; {form.name} needs {form.needs}")
    warnings.warn(message, stacklevel=5)


def _content(file: StoredFile) -> bytes:
    return hashlib.blake2b(file.read(), digest_size=16).digest()


def _check_options(options: ReadOptions, split: str | None, holdout: float) -> None:
    if split not in SPLITS:
        raise unknown_name("split", split, [str(name) for name in SPLITS])
    if not 0.0 < holdout < 1.0:
        raise ValueError(f"holdout: expected a share between 0 and 1, got {holdout}")
    if min(options.size) < 1 or options.stride < 1:
        raise ValueError(f"size, stride: expected at least 1, got {options.size} and {options.stride}")
    if options.depth_scale is not None and not options.depth_scale > 0:
        raise ValueError(f"depth_scale: expected units per meter > 0, got {options.depth_scale}")
    if options.cache_bytes < 0:
        raise ValueError(f"cache_bytes: expected 0 or more, got {options.cache_bytes}")
    if len(options.background) != 3 or not all(0 <= part <= 1 for part in options.background):
        raise ValueError(f"background: expected red, green and blue in [0, 1], got {options.background}")
    if options.intrinsics is not None and options.intrinsics.shape != (3, 3):
        raise ShapeError("intrinsics", expected="[3, 3]", got=options.intrinsics.shape)
