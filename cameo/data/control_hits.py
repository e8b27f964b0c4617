"""How often the matches of another scene are right by accident, which says what a control with them can show.

Axes: B samples, V views, N tokens per view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cameo.correspondence import GridSize
from cameo.correspondence.controls import matches_of_next_sample, near_tokens, within_tokens
from cameo.data.batches import match_batch
from cameo.data.sampling import MultiViewDataset
from cameo.scenes.views import collate

__all__ = ["ControlHits", "control_hits"]

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class ControlHits:
    """How often the control `other_scene` is right by accident, beside what there is to match; shares in [0, 1].

    - `control`: matches of the control within one token of the true match, of all tokens that have both.
    - `control_in_reference`: the same for the matches in the reference alone, which is what a target can copy.
    - `chance`: the same as `control` for a token of the view that is drawn uniformly.
    - `matched`: tokens of the targets that have a match in the reference.
    - `overlap`: share of a target that the reference shows, its 5, 50 and 95 % quantiles over scenes and targets.
    - `num_samples`: number of samples that were looked at.
    """

    control: float
    control_in_reference: float
    chance: float
    matched: float
    overlap: tuple[float, float, float]
    num_samples: int


def control_hits(
    dataset: MultiViewDataset, token_grids: GridSize, *, batch_size: int, num_samples: int = 128, within: int = 1
) -> ControlHits:
    """Count how often the matches of the next sample of a batch are those of the sample itself.

    Training with them (`correspondence_control=other_scene`) is a control only as far as they are not: on a rig of
    fixed poses they come near the truth wherever scenes are as far away as each other. The first samples of the data
    set are taken, in the batches in which a training takes them, so the result is a pure function of the data set.

    Example:
        >>> import tempfile
        >>> from cameo.data import EmbeddedScenes, RoomRig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = {"content": "bare_rooms", "cache_dir": folder, "progress": False}
        ...     scenes = EmbeddedScenes(num_scenes=4, size=(32, 32), rig=RoomRig.fan(2), **settings)
        ...     hits = control_hits(MultiViewDataset(scenes, 2, selection="in_order"), 8, batch_size=4, num_samples=4)
        >>> 0 <= hits.chance < 0.15, hits.num_samples
        (True, 4)

    Args:
        dataset: scenes with depth; their first view is the reference.
        token_grids: token grid of the supervised layer, one number, `(h, w)`, or one grid per view.
        batch_size: samples per batch, at least 2. The last sample of a batch takes the matches of the first.
        num_samples: samples to count over, rounded down to whole batches.
        within: distance in tokens that still counts as right, the larger of the row and the column difference.

    Raises:
        ValueError: for a batch of one sample, or fewer samples than a batch.
        DataError: if the data set has no depth.
    """
    if not 2 <= batch_size <= num_samples:
        raise ValueError(f"batch_size: expected 2 to num_samples={num_samples}, got {batch_size}")
    counts = torch.zeros(6, dtype=torch.float64)
    shares: list[float] = []
    batches = num_samples // batch_size
    for batch in range(batches):
        samples = [dataset[batch * batch_size + place] for place in range(batch_size)]
        match = match_batch(collate(samples), token_grids)
        control = matches_of_next_sample(match)
        both, right = match.matched & control.matched, within_tokens(control, match, within)
        in_reference = match.matched[:, 1:, 0]
        counts += torch.stack(
            [
                right.sum(),
                both.sum(),
                right[:, 1:, 0].sum(),
                both[:, 1:, 0].sum(),
                near_tokens(match, within)[both].sum(),
                in_reference.sum(),
            ]
        )
        tokens = sum(h * w for h, w in match.token_grids[1:]) * len(samples)
        for sample in samples:
            reference, *targets = sample["scene_views"]
            shares += dataset.overlap(sample["scene"])[targets, reference].tolist()
    right, both, right_in, both_in, chance, matched = counts.tolist()
    return ControlHits(
        control=right / max(both, 1),
        control_in_reference=right_in / max(both_in, 1),
        chance=chance / max(both, 1),
        matched=matched / (tokens * batches),
        overlap=tuple(torch.tensor(shares).quantile(torch.tensor(QUANTILES)).tolist()),
        num_samples=batches * batch_size,
    )
