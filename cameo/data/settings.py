"""Settings of the data: which scenes, how many views of them, and how much they overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cameo.choices import MESH_SUFFIXES, RIG_NAMES
from cameo.errors import DataError
from cameo.settings import Settings, setting

__all__ = ["EMBEDDED", "DataSettings", "data_format"]

EMBEDDED = ("scenes", "bare_rooms", "objects")


@dataclass
class DataSettings(Settings):
    """Data: an RGB-D sequence, a folder of meshes, or embedded scenes."""

    # Folder of an RGB-D sequence (7-Scenes or TUM layout) or of meshes. null, the default, takes embedded scenes, so
    # that everything runs without a download.
    train_data_dir: str | None = setting(None, path=True, changeable=True)
    # What the data is: scenes (furnished rooms), bare_rooms (empty rooms with bold patterns, on which small models
    # learn within minutes) and objects are embedded; meshes and rgbd are read from train_data_dir. auto, the default,
    # looks into train_data_dir, and without it takes objects if there is a camera_rig, else scenes.
    data_format: str = setting("auto", choices=("auto", *EMBEDDED, "meshes", "rgbd"))
    # Camera matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of the full color image, for a sequence that does
    # not state its own. null, the default, reads it from the sequence.
    intrinsics: list[list[float]] | None = setting(None)
    # Units of a sequence's depth images per meter, > 0. null, the default, takes that of the layout (1000 for 7-Scenes,
    # 5000 for TUM).
    depth_scale: float | None = setting(None, above=0)
    # Poses of the cameras around an object or mesh, as a backbone expects them; a sample is then all views of the rig.
    # null, the default, draws cameras that overlap. A sequence has cameras of its own.
    camera_rig: str | None = setting(None, choices=RIG_NAMES)
    # Side of the square images in pixels, >= 1; the backbone says which sides it can divide. 64 by default: small
    # enough for a CPU; released models are trained at 256 to 576.
    resolution: int = setting(64, at_least=1)
    # Views per sample, >= 2. 3 by default: a reference and two targets, the least with which a target sees another.
    num_views: int = setting(3, at_least=2)
    # Views of a sample that are given to the model clean, >= 0 and fewer than num_views. 1 by default, as most
    # released models have it; 0 for models that are conditioned on text alone.
    num_reference_views: int = setting(1, at_least=0)
    # Least overlap of the views of a sample, a share in [0, 1], not above max_overlap. 0.3 by default: with less, few
    # tokens have a match.
    min_overlap: float = setting(0.3, share="[0, 1]")
    # Largest overlap of the views of a sample, a share in [0, 1]. 0.9 by default: views that are almost the same teach
    # nothing.
    max_overlap: float = setting(0.9, share="[0, 1]")
    # Embedded scenes or meshes to train on, >= 1. 256 by default, which a small model does not learn
    # by heart.
    num_scenes: int = setting(256, at_least=1)
    # Embedded scenes to validate on, >= 1; none of them is trained on. 16 by default.
    num_validation_scenes: int = setting(16, at_least=1, changeable=True)
    # Views rendered of each embedded scene, >= 1, from which samples are drawn; with a camera_rig it is num_views.
    # 8 by default: 56 ordered pairs of views.
    views_per_scene: int = setting(8, at_least=1)
    # Seed of the embedded scenes and of the validation samples, >= 0; keep it, and runs can be compared. 0 by default.
    data_seed: int = setting(0, at_least=0)
    # Processes that load data, >= 0. 0, the default, loads in the training process and needs no core of its
    # own.
    dataloader_num_workers: int = setting(0, at_least=0, changeable=True)

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.num_reference_views >= self.num_views:
            raise ValueError(
                f"num_reference_views={self.num_reference_views}: expected fewer than num_views={self.num_views}, "
                "so that a target view is left to predict"
            )
        if self.min_overlap > self.max_overlap:
            raise ValueError(
                f"min_overlap={self.min_overlap}: expected at most max_overlap={self.max_overlap}; give both"
            )
        if self.intrinsics is not None and [len(row) for row in self.intrinsics] != [3, 3, 3]:
            raise ValueError(
                f"intrinsics: expected 3 rows of 3 numbers, [[fx,0,cx],[0,fy,cy],[0,0,1]], got {self.intrinsics}"
            )
        if self.camera_rig is not None and self.data_format in ("scenes", "bare_rooms", "rgbd"):
            raise ValueError(
                f"camera_rig={self.camera_rig}: stands around an object, so it needs data_format=objects, meshes or "
                f"auto, got {self.data_format}; give camera_rig=null"
            )
        if self.train_data_dir and self.data_format in EMBEDDED:
            raise ValueError(
                f"data_format={self.data_format} is embedded, so train_data_dir={self.train_data_dir} would not be "
                "read; give data_format=auto, or train_data_dir=null"
            )


def data_format(settings: DataSettings) -> str:
    """Return the `data_format` of a run, with `auto` resolved.

    Example:
        >>> data_format(DataSettings()), data_format(DataSettings(camera_rig="mvdream", num_views=4))
        ('scenes', 'objects')

    Raises:
        DataError: if `train_data_dir` is no folder.
    """
    if settings.data_format != "auto":
        return settings.data_format
    if settings.train_data_dir:
        folder = Path(settings.train_data_dir)
        if not folder.is_dir():
            raise DataError(f"train_data_dir={folder}: no such folder")
        return "meshes" if any(path.suffix.lower() in MESH_SUFFIXES for path in folder.rglob("*")) else "rgbd"
    return "objects" if settings.camera_rig else "scenes"
