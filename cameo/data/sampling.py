"""Training samples of views that overlap, as a pure function of seed and index."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.data.overlap import scene_overlap
from cameo.errors import DataError, unknown_name
from cameo.scenes.views import MultiViewSample, SceneSource, Views, as_lazy, check_sample, images_to_float

__all__ = ["MultiViewDataset", "choose_views"]

SELECTIONS = ("overlap", "in_order")
# Number of scenes whose overlap is kept in memory; a matrix takes 4 F² bytes.
REMEMBERED_SCENES = 4096


def choose_views(
    overlap: Tensor,
    rng: np.random.Generator,
    *,
    num_views: int,
    min_overlap: float,
    max_overlap: float,
) -> list[int] | None:
    """Draw a first reference and `num_views - 1` other views that overlap it; None where no set exists.

    A view is admissible if the share of its measured points that the first reference shows,
    `overlap[view, reference]`, lies in [`min_overlap`, `max_overlap`].

    Example:
        >>> overlap = torch.tensor([[1.0, 0.5, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> rng = np.random.default_rng(0)
        >>> sorted(choose_views(overlap, rng, num_views=2, min_overlap=0.3, max_overlap=0.9))
        [0, 1]
    """
    admissible = (overlap >= min_overlap) & (overlap <= max_overlap)
    admissible.fill_diagonal_(False)
    references = (admissible.sum(0) >= num_views - 1).nonzero().flatten().tolist()
    if not references:
        return None
    reference = references[int(rng.integers(len(references)))]
    others = admissible[:, reference].nonzero().flatten().numpy()
    chosen = rng.choice(others, size=num_views - 1, replace=False)
    return [reference, *(int(view) for view in chosen)]


class MultiViewDataset(Dataset[MultiViewSample]):
    """Training samples from a scene source: some reference views and target views.

    Example:
        >>> class Wall:
        ...     def __len__(self):
        ...         return 1
        ...     def views(self, scene):
        ...         extrinsics = torch.eye(4).repeat(3, 1, 1)
        ...         extrinsics[:, 0, 3] = torch.tensor([0.0, 0.5, 1.0])
        ...         intrinsics = torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]).repeat(3, 1, 1)
        ...         images, depth = torch.rand(3, 3, 16, 16), torch.full((3, 1, 16, 16), 2.0)
        ...         return Views(images, depth, intrinsics, extrinsics, "wall")
        >>> sample = MultiViewDataset(Wall(), num_views=2, length=5)[0]
        >>> sample["images"].shape, sample["num_reference_views"]
        (torch.Size([2, 3, 16, 16]), 1)

    `dataset[i]` depends on `seed` and `i` only, so a resumed run needs no loader state. Each pass over the scenes takes
    them in another random order.

    - `num_views`: views per sample, references included; `num_reference_views` of them come first.
    - `min_overlap`, `max_overlap`: bounds of the share of each other view's measured surface points that the
      first reference shows. Where a scene has no such set, the next scene is taken.
    - `length`: number of samples; None = scenes times views of the first scene, scenes alone for "in_order".
    - `selection`: "overlap" draws views as above. "in_order" takes all views of a scene as they come, for a source
      whose views are a model's rig (`EmbeddedScenes(rig=...)`); the overlap plays no part.

    A `LazySource` decodes the views of a sample alone. Where its views have tracks, a sample has those of its views as
    `tracks`. Cameras stay in the world frame of the source. Raises `ValueError` on wrong settings and `DataError` where
    no scene has an admissible set (with the overlap found), where a scene has another number of views than
    "in_order" needs, or where a sample is not usable.
    """

    def __init__(
        self,
        source: SceneSource,
        num_views: int = 4,
        num_reference_views: int = 1,
        min_overlap: float = 0.3,
        max_overlap: float = 0.9,
        seed: int = 0,
        length: int | None = None,
        selection: str = "overlap",
    ) -> None:
        if selection not in SELECTIONS:
            raise unknown_name("selection", selection, SELECTIONS)
        if num_views < 1:
            raise ValueError(f"num_views: expected at least 1, got {num_views}")
        if not 0 <= num_reference_views <= num_views:
            raise ValueError(f"num_reference_views: expected 0 to num_views={num_views}, got {num_reference_views}")
        if not 0.0 <= min_overlap <= max_overlap <= 1.0:
            raise ValueError(
                f"min_overlap, max_overlap: expected 0 <= min <= max <= 1, got {min_overlap}, {max_overlap}"
            )
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if length is not None and length < 1:
            raise ValueError(f"length: expected at least 1 or None, got {length}")
        if len(source) == 0:
            raise DataError("source: expected at least one scene, got none")
        self.source, self.seed = source, seed
        self.num_views, self.num_reference_views = num_views, num_reference_views
        self.min_overlap, self.max_overlap = min_overlap, max_overlap
        self.selection = selection
        if selection == "in_order":
            self._check_number(0)
        if length is None:
            length = len(source) * (1 if selection == "in_order" else len(self.scenes.cameras(0)))
        self.length = length
        self._overlaps: OrderedDict[int, Tensor] = OrderedDict()

    @property
    def source(self) -> SceneSource:
        """The scenes; `scenes` are the same as a `LazySource`."""
        return self._source

    @source.setter
    def source(self, source: SceneSource) -> None:
        self._source, self.scenes = source, as_lazy(source)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> MultiViewSample:
        """Return sample number `index`; the same for the same seed, in any process and in any order."""
        scene, chosen = self.choose(index)
        if self.selection == "in_order":
            self._check_number(scene)
        return self._sample(scene, self.scenes.select(scene, chosen), chosen)

    def scene_order(self, epoch: int) -> np.ndarray:
        """Return the scenes in the order in which pass number `epoch` takes them, one scene per sample."""
        return np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.source))

    def views_of(self, index: int, scene: int) -> list[int] | None:
        """Return the views that sample number `index` takes of a scene; None if the scene has no admissible set."""
        if self.selection == "in_order":
            return list(range(self.num_views))
        return choose_views(
            self.overlap(scene),
            np.random.default_rng((self.seed, 1, index)),
            num_views=self.num_views,
            min_overlap=self.min_overlap,
            max_overlap=self.max_overlap,
        )

    def choose(self, index: int) -> tuple[int, list[int]]:
        """Return the scene of sample number `index`, and its views in the order of the sample."""
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected 0 to {self.length - 1}, got {index}")
        epoch, position = divmod(index, len(self.source))
        order = self.scene_order(epoch)
        for scene in map(int, np.roll(order, -position)):
            chosen = self.views_of(index, scene)
            if chosen is not None:
                return scene, chosen
        raise self._no_admissible_set()

    def overlap(self, scene: int) -> Tensor:
        """Return the overlap matrix of a scene (see `view_overlap`), measured once and kept in memory."""
        if scene not in self._overlaps:
            self._overlaps[scene] = scene_overlap(self.scenes, scene)
            if len(self._overlaps) > REMEMBERED_SCENES:
                self._overlaps.popitem(last=False)
        return self._overlaps[scene]

    def geometry(self, views: Views) -> dict[str, Tensor]:
        """Return `depth` (0 where there is no measurement), `intrinsics` and `extrinsics` of views."""
        depth = views.depth.float()
        return {
            "intrinsics": views.intrinsics.float(),
            "extrinsics": views.extrinsics.float(),
            "depth": torch.where(torch.isfinite(depth) & (depth > 0), depth, 0.0),
        }

    def _sample(self, scene: int, views: Views, chosen: list[int]) -> MultiViewSample:
        geometry = self.geometry(views)
        sample = MultiViewSample(
            images=images_to_float(views.images),
            intrinsics=geometry["intrinsics"],
            extrinsics=geometry["extrinsics"],
            depth=geometry["depth"],
            num_reference_views=self.num_reference_views,
            key=f"{views.key}/{'-'.join(map(str, chosen))}",
            scene=scene,
            scene_views=chosen,
        )
        if views.up is not None:
            sample["up"] = views.up.float()
        if views.tracks is not None:
            sample["tracks"] = views.tracks
        check_sample(sample)
        return sample

    def _check_number(self, scene: int) -> None:
        cameras = self.scenes.cameras(scene)
        if (count := len(cameras)) != self.num_views:
            raise DataError(
                f'scene {cameras.key}: has {count} views, and selection="in_order" takes all of them, got '
                f"num_views={self.num_views}; use num_views={count}, or selection='overlap' for a choice of views"
            )

    def _no_admissible_set(self) -> DataError:
        overlaps = []
        for scene in range(len(self.source)):
            overlap = self.overlap(scene)
            overlaps.append(overlap[~torch.eye(len(overlap), dtype=torch.bool)])
        pairs = torch.cat(overlaps)
        shown = f"{pairs.min():.2f} to {pairs.max():.2f}" if len(pairs) else "none (one view per scene)"
        return DataError(
            f"no scene has {self.num_views} views whose overlap with a reference lies between "
            f"min_overlap={self.min_overlap} and max_overlap={self.max_overlap}; overlap found: {shown}. "
            "Widen the bounds, lower num_views, or use more views per scene"
        )
