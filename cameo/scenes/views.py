"""What every data source provides: the views of one scene, and the sample on which a model trains.

Axes: F views of a scene, V views of a sample, B samples, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.correspondence.tracks import Tracks
from cameo.errors import DataError, ShapeError
from cameo.geometry import check_cameras
from cameo.geometry.cameras import check_image_size

__all__ = [
    "LazySource",
    "MultiViewSample",
    "SceneCameras",
    "SceneSource",
    "Views",
    "WholeScenes",
    "as_lazy",
    "check_sample",
    "collate",
    "images_to_float",
]


@dataclass(frozen=True)
class Views:
    """All views of one scene, with cameras and depth.

    - `images` `[F, 3, H, W]`: uint8 in 0..255, or float in [0, 1].
    - `depth` `[F, 1, H, W]` float32: z-depth in the world's unit; 0, negative or non-finite = no measurement. It is 0
      everywhere where a source has none.
    - `intrinsics` `[F, 3, 3]` float32 in pixels, pixel centers at +0.5.
    - `extrinsics` `[F, 4, 4]` float32, world-to-camera, OpenCV axes.
    - `key`: a name for messages.
    - `up` `[3]` float32: unit vector that points up in the world; None where the source does not know it.
    - `tracks`: surface points that several of these views show, in pixels of `images`; None where there are none.

    Raises `ShapeError` where the fields do not fit each other.

    Example:
        >>> views = Views(images=torch.zeros(2, 3, 8, 8), depth=torch.ones(2, 1, 8, 8),
        ...               intrinsics=torch.eye(3).repeat(2, 1, 1), extrinsics=torch.eye(4).repeat(2, 1, 1),
        ...               key="room")
        >>> len(views), views.size
        (2, (8, 8))
    """

    images: Tensor
    depth: Tensor
    intrinsics: Tensor
    extrinsics: Tensor
    key: str
    up: Tensor | None = None
    tracks: Tracks | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ShapeError(f"images of {self.key!r}", expected="[F, 3, H, W]", got=self.images.shape)
        count, _, height, width = self.images.shape
        fields = {
            "depth": (self.depth, (count, 1, height, width)),
            "intrinsics": (self.intrinsics, (count, 3, 3)),
            "extrinsics": (self.extrinsics, (count, 4, 4)),
        }
        for name, (tensor, expected) in fields.items():
            if tuple(tensor.shape) != expected:
                raise ShapeError(f"{name} of {self.key!r}", expected=str(list(expected)), got=tensor.shape)
        if self.up is not None and tuple(self.up.shape) != (3,):
            raise ShapeError(f"up of {self.key!r}", expected="[3]", got=self.up.shape)
        if self.tracks is not None and self.tracks.num_views != count:
            raise ShapeError(
                f"tracks of {self.key!r}", expected=f"{count} views, as images", got=f"{self.tracks.num_views}"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.images.shape[-2], self.images.shape[-1]

    def select(self, indices: Sequence[int]) -> Views:
        """Return the views with these numbers, in this order.

        Example:
            >>> cameras = {"intrinsics": torch.eye(3).repeat(3, 1, 1), "extrinsics": torch.eye(4).repeat(3, 1, 1)}
            >>> views = Views(torch.zeros(3, 3, 8, 8), torch.ones(3, 1, 8, 8), **cameras, key="room")
            >>> len(views.select([2, 0]))
            2
        """
        chosen = list(indices)
        return Views(
            images=self.images[chosen],
            depth=self.depth[chosen],
            intrinsics=self.intrinsics[chosen],
            extrinsics=self.extrinsics[chosen],
            key=self.key,
            up=self.up,
            tracks=None if self.tracks is None else self.tracks.of_views(chosen),
        )


@dataclass(frozen=True)
class SceneCameras:
    """What is known of all views of a scene before any image is decoded.

    - `intrinsics` `[F, 3, 3]`, `extrinsics` `[F, 4, 4]`, `key`, `up`, `tracks`: as in `Views`.
    - `size`: height and width of the images in pixels.
    - `has_depth`: whether any view has depth.

    Example:
        >>> cameras = SceneCameras(torch.eye(3).repeat(5, 1, 1), torch.eye(4).repeat(5, 1, 1), (8, 8), "room")
        >>> len(cameras)
        5
    """

    intrinsics: Tensor
    extrinsics: Tensor
    size: tuple[int, int]
    key: str
    up: Tensor | None = None
    tracks: Tracks | None = None
    has_depth: bool = True

    def __len__(self) -> int:
        return self.intrinsics.shape[0]


@runtime_checkable
class SceneSource(Protocol):
    """Anything that has a number of scenes and provides the views of each.

    A source must be a pure function of the scene index: the same index always gives the same views.

    Example:
        >>> class OneRoom:
        ...     def __len__(self) -> int:
        ...         return 1
        ...     def views(self, scene: int) -> Views: ...
        >>> isinstance(OneRoom(), SceneSource)
        True
    """

    def __len__(self) -> int:
        """Return the number of scenes."""
        ...

    def views(self, scene: int) -> Views:
        """Return the views of scene number `scene`, 0 <= scene < len(self)."""
        ...


@runtime_checkable
class LazySource(SceneSource, Protocol):
    """A source that can return some views of a scene without decoding the others, for scenes of many views.

    `select(scene, indices)` equals `views(scene).select(indices)`.

    Example:
        >>> class LongSequence:
        ...     def __len__(self) -> int:
        ...         return 1
        ...     def views(self, scene: int) -> Views: ...
        ...     def cameras(self, scene: int) -> SceneCameras: ...
        ...     def select(self, scene: int, indices: Sequence[int]) -> Views: ...
        >>> isinstance(LongSequence(), LazySource)
        True
    """

    def cameras(self, scene: int) -> SceneCameras:
        """Return what is known of all views of a scene without decoding an image."""
        ...

    def select(self, scene: int, indices: Sequence[int]) -> Views:
        """Return the views of a scene with these numbers, in this order."""
        ...


class WholeScenes:
    """A source that loads whole scenes, as a `LazySource`; it keeps the scene that it loaded last.

    Views of a scene are first chosen and then used, so keeping the last one saves loading it twice.
    """

    def __init__(self, source: SceneSource) -> None:
        self.source = source
        self._latest: tuple[int, Views] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "_latest": None}  # what is loaded is not sent to another process

    def views(self, scene: int) -> Views:
        """Return the views of a scene."""
        if self._latest is None or self._latest[0] != scene:
            self._latest = (scene, self.source.views(scene))
        return self._latest[1]

    def cameras(self, scene: int) -> SceneCameras:
        """Return the cameras and tracks of a scene, which is loaded for that."""
        views = self.views(scene)
        return SceneCameras(views.intrinsics, views.extrinsics, views.size, views.key, up=views.up, tracks=views.tracks)

    def select(self, scene: int, indices: Sequence[int]) -> Views:
        """Return some views of a scene, which is loaded for that."""
        return self.views(scene).select(indices)


def as_lazy(source: SceneSource) -> LazySource:
    """Return the source itself where it can decode views alone, else one that loads whole scenes.

    Example:
        >>> class Rooms:
        ...     def __len__(self) -> int:
        ...         return 3
        ...     def views(self, scene: int) -> Views: ...
        >>> len(as_lazy(Rooms()))
        3
    """
    return source if isinstance(source, LazySource) else WholeScenes(source)


class MultiViewSample(TypedDict):
    """One training sample; reference (clean, conditioning) views come first, then target views.

    - `images` `[V, 3, H, W]` float32 in [0, 1]
    - `intrinsics` `[V, 3, 3]` float32 in pixels, pixel centers at +0.5
    - `extrinsics` `[V, 4, 4]` float32, world-to-camera, OpenCV axes, in the world frame of the source
    - `depth` `[V, 1, H, W]` float32 z-depth, 0 = no measurement
    - `point_map` `[V, 3, H, W]`, optional: world coordinates, non-finite = no measurement
    - `up` `[3]` float32, optional: unit vector that points up in the world
    - `tracks`, optional: surface points that several views show, in pixels of `images`
    - `num_reference_views`: how many views are references
    - `key`: names the scene and the views, for messages
    - `scene`, `scene_views`, optional: number of the scene in its source, and of the views in the scene
    - `correspondences`, optional: matches of the sample, a batch of one for each token grid that is supervised
    - `not_precomputed`, optional: whether they had to be computed although a folder of matches was given

    `collate` stacks samples: tensors get a leading B, correspondences are joined, everything else becomes a list.
    """

    images: Tensor
    intrinsics: Tensor
    extrinsics: Tensor
    depth: Tensor
    point_map: NotRequired[Tensor]
    up: NotRequired[Tensor]
    tracks: NotRequired[Tracks]
    num_reference_views: int
    key: str
    scene: NotRequired[int]
    scene_views: NotRequired[list[int]]
    correspondences: NotRequired[list[Correspondence]]
    not_precomputed: NotRequired[bool]


def images_to_float(images: Tensor) -> Tensor:
    """Convert images to float32 in [0, 1]; uint8 is divided by 255, floats keep their values.

    Example:
        >>> images_to_float(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([0., 1.])
    """
    return images.float() / 255.0 if images.dtype == torch.uint8 else images.float()


def check_sample(sample: MultiViewSample) -> None:
    """Check that the images are finite and in [0, 1] and that the cameras are cameras.

    Raises `DataError` that names the sample's key.

    Example:
        >>> sample = {"images": torch.full((1, 3, 2, 2), float("nan")), "key": "room/0"}
        >>> check_sample(sample)
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: sample room/0: images hold NaN or infinite values; check the source's files
    """
    images = sample["images"]
    if not torch.isfinite(images).all():
        raise DataError(f"sample {sample['key']}: images hold NaN or infinite values; check the source's files")
    low, high = images.min().item(), images.max().item()
    if low < 0.0 or high > 1.0:
        raise DataError(
            f"sample {sample['key']}: images expected in [0, 1], got {low:.4g} to {high:.4g}; "
            "hand over uint8 images or divide by their maximum"
        )
    try:
        check_cameras(sample["intrinsics"][None], sample["extrinsics"][None])
        check_image_size(sample["intrinsics"][None], images.shape[-2:])
    except ValueError as error:
        raise DataError(f"sample {sample['key']}: {error}") from error


def collate(samples: list[MultiViewSample]) -> dict[str, object]:
    """Stack samples into a batch: tensors `[B, ...]`, correspondences of all samples, `num_reference_views` one int.

    Everything else becomes a list, such as `key` and `tracks`.

    Raises `ValueError` on an empty list, on different numbers of reference views, and where one sample has a
    field that another lacks; `ShapeError` where the shapes differ.

    Example:
        >>> one = {"images": torch.zeros(2, 3, 4, 4), "num_reference_views": 1, "key": "room/0"}
        >>> batch = collate([one, one])
        >>> tuple(batch["images"].shape), batch["num_reference_views"], batch["key"]
        ((2, 2, 3, 4, 4), 1, ['room/0', 'room/0'])
    """
    if not samples:
        raise ValueError("samples: expected at least one sample, got an empty list")
    first = samples[0]
    for sample in samples[1:]:
        if sample["num_reference_views"] != first["num_reference_views"]:
            raise ValueError(
                "num_reference_views must agree within a batch, got "
                f"{first['num_reference_views']} ({first['key']}) and "
                f"{sample['num_reference_views']} ({sample['key']}); batch equal samples only"
            )
        if sample.keys() != first.keys():
            different = ", ".join(sorted(sample.keys() ^ first.keys()))
            raise ValueError(
                f"fields of {first['key']} and {sample['key']} differ: {different}; "
                "batch samples of sources that give the same fields"
            )
    batch: dict[str, object] = {}
    for name, value in first.items():
        values = [sample[name] for sample in samples]  # type: ignore[literal-required]
        if isinstance(value, Tensor):
            for sample, other in zip(samples, values, strict=True):
                if other.shape != value.shape:
                    raise ShapeError(
                        f"{name} of {sample['key']}",
                        expected=str(list(value.shape)),
                        got=other.shape,
                        cure="Samples of one batch need the same number of views and the same image size",
                    )
            batch[name] = torch.stack(values)
        elif name == "correspondences":
            batch[name] = [Correspondence.cat(parts) for parts in zip(*values, strict=True)]
        else:
            batch[name] = values
    batch["num_reference_views"] = first["num_reference_views"]
    return batch
