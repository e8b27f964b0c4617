"""Samples with the latents of their views, read by the data workers."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import Dataset

from cameo.errors import DataError
from cameo.latents.store import LatentReader, image_keys
from cameo.scenes.views import MultiViewSample

__all__ = ["LatentDataset"]


class LatentDataset(Dataset[MultiViewSample]):
    """The samples of a data set with their `latents`, beside the images that some conditions are made of.

    Args:
        dataset: samples; those that name their `scene` and `scene_views` are looked up by their pixels once.
        reader: the latents of all views.
        encoded_together: of a number of views, those that the encoder sees as one image.

    Raises:
        DataError: from a sample whose pixels were not encoded.
    """

    def __init__(
        self,
        dataset: Dataset[MultiViewSample],
        reader: LatentReader,
        encoded_together: Callable[[int], list[list[int]]],
    ) -> None:
        self.dataset, self.reader, self.encoded_together = dataset, reader, encoded_together
        self._keys: dict[tuple[int, ...], list[int]] = {}

    def __getitem__(self, index: int) -> MultiViewSample:
        """Return a sample of the data set, with its latents."""
        sample = self.dataset[index]
        try:
            latents = self.reader.read(self._sample_keys(sample))
        except KeyError:
            raise DataError(
                f"sample {sample['key']}: its pixels are not among those that were encoded when the training started. "
                "A source has to give the same views of a scene each time, and machines of one run need a latents_dir= "
                "that all see; cache_latents=false trains without"
            ) from None
        return MultiViewSample(**sample, latents=latents)

    def _sample_keys(self, sample: MultiViewSample) -> list[int]:
        images, keys = sample["images"], dict[int, int]()
        named = "scene" in sample and "scene_views" in sample
        for views in self.encoded_together(len(images)):
            name = (sample["scene"], *(sample["scene_views"][view] for view in views)) if named else ()
            found = self._keys.get(name)
            if found is None:
                found = image_keys(images[views])
                if named:
                    self._keys[name] = found
            keys |= dict(zip(views, found, strict=True))
        return [keys[view] for view in range(len(images))]
