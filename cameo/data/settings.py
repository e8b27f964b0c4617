"""Settings of the data: which scenes, how many views of them, and how much they overlap."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cameo.choices import POSED_FORMATS, RIG_NAMES, ROOM_RIG_NAMES
from cameo.errors import DataError
from cameo.scenes.room_rig import RoomRig
from cameo.settings import Settings, setting

__all__ = ["EMBEDDED", "RIG_SETTINGS", "DataSettings", "data_format", "room_rig"]

EMBEDDED = ("scenes", "bare_rooms", "objects")


# Settings that a rig in rooms has.
RIG_SETTINGS = (
    "rig_azimuths",
    "rig_elevations",
    "rig_jitter",
    "rig_separation",
    "rig_reference_elevation",
    "rig_distance",
)


@dataclass
class DataSettings(Settings):
    """Data: a folder of posed images or meshes, or embedded scenes."""

    # Folder of posed images in one of the formats of docs/data.md, or of meshes; a scene, or several. null, the
    # default, takes embedded scenes, so that everything runs without a download.
    train_data_dir: str | None = setting(None, path=True, changeable=True)
    # What the data is: scenes (furnished rooms), bare_rooms (empty rooms with bold patterns, on which small models
    # learn within minutes) and objects are embedded; the others are formats of train_data_dir. auto, the default,
    # looks into train_data_dir, and without it takes objects if there is a camera_rig around an object, else scenes.
    data_format: str = setting("auto", choices=("auto", *EMBEDDED, "meshes", *POSED_FORMATS))
    # Camera matrix [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of the full, undistorted color image, for data that
    # does not state its own. null, the default, reads it from the files.
    intrinsics: list[list[float]] | None = setting(None)
    # Numbers in the depth files per unit of the world, > 0. null, the default, takes that of the format (1000 for
    # 7-Scenes and nerfstudio, 5000 for TUM).
    depth_scale: float | None = setting(None, above=0)
    # Folder with the depth (depth/NAME.npy) or points (points/NAME.npy) that another program has estimated for the
    # photographs of train_data_dir, see docs/guides/without_depth.md. null, the default, takes the depth of the data
    # itself.
    estimated_depth: str | None = setting(None, path=True, changeable=True)
    # Red, green and blue in [0, 1] that transparent pixels of train_data_dir show. White by default, as zero123 and the
    # models trained on its renders have it.
    image_background: tuple[float, float, float] = setting((1.0, 1.0, 1.0), share="[0, 1]")
    # Decoded views of train_data_dir that are kept in each process that loads data, in MB, >= 0. 256 by default: all
    # of some hundred views at 512 pixels, and little beside a model.
    view_cache_mb: int = setting(256, at_least=0, changeable=True)
    # Poses of the cameras, for backbones that are told none; a sample is then all views of the rig. fan stands in
    # scenes or bare_rooms: all views look at a point of the room, at the angles of rig_azimuths and rig_elevations
    # and with an overlap from min_overlap to max_overlap; the others stand around an object or mesh, as a release has
    # them. null, the default, draws cameras that overlap. A sequence has cameras of its own.
    camera_rig: str | None = setting(None, choices=(*RIG_NAMES, *ROOM_RIG_NAMES))
    # Azimuths of a fan's views relative to view 0 in degrees, [-180, 180], one per view, that of view 0 being 0. null,
    # the default, stands the targets evenly on both sides of view 0, out to 24 degrees.
    rig_azimuths: list[float] | None = setting(None)
    # Elevations of a fan's views relative to view 0 in degrees, [-90, 90], one per view, that of view 0 being 0. null,
    # the default, is 6 degrees higher and lower in turn, so that views differ in rows as well.
    rig_elevations: list[float] | None = setting(None)
    # Degrees, >= 0, by which azimuth and elevation of a fan's targets vary from scene to scene, uniformly to both
    # sides. [0, 0] by default: fixed poses, which a backbone can learn without being told. One that is told the poses
    # should see others in each scene, or it learns a shift instead of looking up.
    rig_jitter: tuple[float, float] = setting((0.0, 0.0), at_least=0)
    # Least angle between the directions of any two cameras of a fan, in degrees, [0, 180). 0 by default, since fixed
    # angles need none; with a large rig_jitter it keeps the views apart.
    rig_separation: float = setting(0.0, at_least=0)
    # Least and largest elevation from which a fan's view 0 looks at the point, in degrees, (-90, 90); drawn once per
    # scene. -5 to 35 by default, from about level to down at the floor. The same number twice is for a backbone that is
    # told the elevations of its targets and not that of its reference.
    rig_reference_elevation: tuple[float, float] = setting((-5.0, 35.0))
    # Least and largest distance of a fan's cameras from the point that they look at, in meters, > 0; drawn once per
    # scene. 1.2 to 1.7 by default, which fits into every embedded room.
    rig_distance: tuple[float, float] = setting((1.2, 1.7), above=0)
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
        self._check_rig()
        if self.train_data_dir and self.data_format in EMBEDDED:
            raise ValueError(
                f"data_format={self.data_format} is embedded, so train_data_dir={self.train_data_dir} would not be "
                "read; give data_format=auto, or train_data_dir=null"
            )

    def _check_rig(self) -> None:
        around_object, of_fan = self.camera_rig in RIG_NAMES, self.camera_rig in ROOM_RIG_NAMES
        if around_object and self.data_format in ("scenes", "bare_rooms", *POSED_FORMATS):
            raise ValueError(
                f"camera_rig={self.camera_rig}: stands around an object, so it needs data_format=objects, meshes or "
                f"auto, got {self.data_format}; give camera_rig=fan, which stands in rooms, or camera_rig=null"
            )
        if of_fan and (self.data_format not in ("scenes", "bare_rooms", "auto") or self.train_data_dir):
            got = f"train_data_dir={self.train_data_dir}" if self.train_data_dir else self.data_format
            raise ValueError(
                f"camera_rig={self.camera_rig}: stands in an embedded room, so it needs data_format=scenes, "
                f"bare_rooms or auto, got {got}; give another camera_rig, or null"
            )
        for name in RIG_SETTINGS:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and not of_fan:
                raise ValueError(
                    f"{name}={value}: is of the rig {' or '.join(ROOM_RIG_NAMES)}, got camera_rig={self.camera_rig}; "
                    f"give camera_rig={ROOM_RIG_NAMES[0]}, or {name}={'null' if default is None else default}"
                )
        room_rig(self)  # which checks the angles and ranges


def data_format(settings: DataSettings) -> str:
    """Return the `data_format` of a run, with `auto` resolved.

    Example:
        >>> data_format(DataSettings()), data_format(DataSettings(camera_rig="mvdream", num_views=4))
        ('scenes', 'objects')

    Raises:
        DataError: if `train_data_dir` is no folder, or is of no format that is known.
    """
    if settings.data_format != "auto":
        return settings.data_format
    if settings.train_data_dir:
        folder = Path(settings.train_data_dir)
        if not folder.is_dir():
            raise DataError(f"train_data_dir={folder}: no such folder")
        from cameo.data.opening import recognize  # imports torch, which settings do without

        return recognize(folder).name
    return "objects" if settings.camera_rig in RIG_NAMES else "scenes"


def room_rig(settings: DataSettings) -> RoomRig | None:
    """Return the rig that the settings place in rooms; None where `camera_rig` is another or none.

    Example:
        >>> room_rig(DataSettings(camera_rig="fan", rig_azimuths=[0, -16, 16])).azimuths
        (0.0, -16.0, 16.0)

    Raises:
        ValueError: if the settings of the rig do not fit `num_views`, or each other; names the setting.
    """
    if settings.camera_rig not in ROOM_RIG_NAMES:
        return None
    try:
        return RoomRig.fan(
            settings.num_views,
            azimuths=settings.rig_azimuths,
            elevations=settings.rig_elevations,
            distance=settings.rig_distance,
            jitter=settings.rig_jitter,
            separation=settings.rig_separation,
            reference_elevation=settings.rig_reference_elevation,
            overlap=(settings.min_overlap, settings.max_overlap),
        )
    except ValueError as error:
        raise ValueError(
            f"camera_rig={settings.camera_rig} with num_views={settings.num_views}: rig_{error}"
        ) from error
