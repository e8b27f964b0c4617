"""One door to what is on disk: recognize the format of a folder, say which it is and why, and open it."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from cameo.choices import MESH_SUFFIXES, POSED_FORMATS
from cameo.data.readers import co3d, colmap, nerfstudio, realestate10k, rgbd, tars, zero123
from cameo.data.readers.files import subfolders
from cameo.data.readers.frames import Format, ReadOptions, SceneFiles
from cameo.data.readers.source import PosedScenes
from cameo.errors import DataError, unknown_name
from cameo.scenes.embedded import EmbeddedScenes
from cameo.scenes.meshes import find_meshes
from cameo.scenes.views import WholeScenes

__all__ = ["MeshScenes", "Recognized", "open_views", "recognize"]

logger = logging.getLogger(__name__)

# In the order in which they are looked for.
FORMATS: tuple[Format, ...] = (
    nerfstudio.FORMAT,
    colmap.FORMAT,
    co3d.FORMAT,
    *rgbd.LAYOUTS.values(),
    realestate10k.FORMAT,
    tars.FORMAT,
    zero123.FORMAT,
)
MESHES = "meshes"
MESHES_NEED = f"files {', '.join(MESH_SUFFIXES)}, also in subfolders"
# How deep the scenes of a folder may lie, and how many folders of one level are looked into for its format.
DEEPEST, LOOKED_INTO = 3, 64


@dataclass(frozen=True)
class Recognized:
    """What a folder was recognized as.

    - `name`: of the format; `reason`: the files that show it, and what else was found.
    - `form`: its reader; None for meshes.
    - `folders`: the folders of the level on which it was found, among which are those that it reads.
    """

    name: str
    reason: str
    form: Format | None = None
    folders: tuple[Path, ...] = ()


class MeshScenes(WholeScenes):
    """Renders of the meshes in a folder, with the `format` that it was taken for and the `reason`.

    Example:
        >>> issubclass(MeshScenes, WholeScenes)
        True
    """

    def __init__(self, source: EmbeddedScenes, reason: str) -> None:
        super().__init__(source)
        self.format, self.reason = MESHES, reason


def open_views(
    folder: str | Path,
    size: tuple[int, int] = (64, 64),
    *,
    data_format: str = "auto",
    split: str | None = None,
    holdout: float = 0.2,
    intrinsics: Tensor | Sequence[Sequence[float]] | None = None,
    depth_scale: float | None = None,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    stride: int = 1,
    cache_bytes: int = ReadOptions.cache_bytes,
) -> PosedScenes | MeshScenes:
    """Open a folder of posed images or meshes as scenes, whichever of the known formats it has.

    The formats, what each needs, and its conventions are listed in docs/data.md. Views are decoded when they are asked
    for: undistorted, cropped at the center to the aspect of `size`, and resized. A folder of several scenes of one
    format is as many scenes. What was recognized is in `format` and `reason`, and in one line of the log.

    Example:
        >>> import tempfile
        >>> open_views(tempfile.mkdtemp())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: ...: not recognized as a data set; it holds no files. Known formats and what they need:
        ...

    Args:
        folder: a scene, or a folder of scenes.
        size: height and width of the images in pixels.
        data_format: name of the format, or "auto". A name helps where a folder holds several.
        split: None for everything; "validation" for the last `holdout` part, "train" for the rest: of the scenes, or of
            the frames where there is one scene.
        holdout: a share in (0, 1).
        intrinsics: `[3, 3]` in pixels of the full, undistorted images, pixel centers at +0.5; wins over the files.
        depth_scale: numbers in the depth files per unit of the world, > 0; wins over the files.
        background: red, green and blue in [0, 1] that transparent pixels show.
        stride: keep every n-th frame.
        cache_bytes: of decoded views that are kept in each process, >= 0.

    Raises:
        DataError: if the folder is not recognized, or files of it cannot be used; it names them and the cure.
        ValueError: for a wrong argument.
    """
    folder = Path(folder)
    recognized = recognize(folder, data_format)
    logger.info("%s: read as %s, since it holds %s", folder, recognized.name, recognized.reason)
    size = (int(size[0]), int(size[1]))
    if recognized.form is None:
        rendered = EmbeddedScenes(split or "train", len(find_meshes(folder)), mesh_dir=folder, size=size)
        return MeshScenes(rendered, recognized.reason)
    options = ReadOptions(
        size=size,
        background=background,
        intrinsics=None if intrinsics is None else np.asarray(intrinsics, dtype=np.float64),
        depth_scale=depth_scale,
        stride=stride,
        cache_bytes=cache_bytes,
    )
    places = [place for place in recognized.folders if recognized.form.recognize(place) is not None]
    scenes = [scene for place in places for scene in recognized.form.scenes(place)]
    opened = PosedScenes(
        recognized.form, _named(scenes, folder), options, split=split, holdout=holdout, reason=recognized.reason
    )
    if len(opened) == 1:
        opened.select(0, [0])  # a fault that all frames have is told when a single scene is opened
    return opened


def recognize(folder: Path, data_format: str = "auto") -> Recognized:
    """Return what a folder is, without reading more than names and first lines.

    A format is recognized by files of its own. Those in the folder itself win over those in its subfolders, and posed
    images over meshes, since many captures hold a mesh too.

    Raises:
        DataError: if there is no such folder, or it is of no known format; lists what it holds, and what formats need.
        ValueError: for an unknown format.
    """
    if data_format not in ("auto", MESHES, *POSED_FORMATS):
        raise unknown_name("data_format", data_format, ("auto", MESHES, *POSED_FORMATS))
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: expected a folder of posed images or meshes, found {found}")
    forms = [form for form in FORMATS if data_format in ("auto", form.name)]
    level = [folder]
    for _ in range(DEEPEST + 1):
        signs = [
            (form, reason, place)
            for place in level[:LOOKED_INTO]
            for form in forms
            if (reason := form.recognize(place))
        ]
        if signs:
            return _chosen(folder, level, signs)
        level = [inner for place in level for inner in subfolders(place)]
    if data_format in ("auto", MESHES) and (mesh := _first_mesh(folder)) is not None:
        return Recognized(MESHES, str(mesh.relative_to(folder)))
    raise DataError(_not_recognized(folder, forms, data_format))


def _chosen(folder: Path, level: list[Path], found: list[tuple[Format, str, Path]]) -> Recognized:
    """The first format in order of those that were found in the folders of a level."""
    form, reason, place = min(found, key=lambda one: FORMATS.index(one[0]))
    where = "" if place == folder else f"{place.relative_to(folder)}/"
    reason = f"{where}{reason}"
    others = {other.name: f"{at.relative_to(folder) / why}" for other, why, at in found if other.name != form.name}
    if others:
        named = ", ".join(f"{path} (data_format={name})" for name, path in others.items())
        reason = f"{reason}; it holds {named} too"
        if level != [folder]:
            warnings.warn(f"{folder}: holds scenes of several formats; read are those as {reason}", stacklevel=4)
    return Recognized(form.name, reason, form, tuple(level))


def _named(scenes: list[SceneFiles], folder: Path) -> list[SceneFiles]:
    """Refuse two scenes that messages and folders of matches could not tell apart."""
    counts = Counter((scene.path, scene.name) for scene in scenes)
    if twice := [scene for scene, count in counts.items() if count > 1]:
        raise DataError(f"{folder}: the scene {twice[0][1] or twice[0][0]} occurs twice; rename one of them")
    return scenes


def _first_mesh(folder: Path) -> Path | None:
    try:
        return find_meshes(folder)[0]
    except DataError:
        return None


def _not_recognized(folder: Path, forms: list[Format], data_format: str) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    counts = Counter(path.suffix.lower() or "files without an ending" for path in files)
    seen = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(6)) or "no files"
    needs = [f"- {form.name}: {form.needs}" for form in forms]
    if data_format in ("auto", MESHES):
        needs.append(f"- {MESHES}: {MESHES_NEED}")
    wanted = "a data set" if data_format == "auto" else f"data_format={data_format}"
    return f"{folder}: not recognized as {wanted}; it holds {seen}. Known formats and what they need:\n" + "\n".join(
        needs
    )
