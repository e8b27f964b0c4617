"""The short check of the data with which a training starts."""

from __future__ import annotations

import warnings

from cameo.errors import DataError
from cameo.inspection.check import check_views
from cameo.inspection.report import WRONG
from cameo.scenes.embedded import EmbeddedScenes
from cameo.scenes.views import SceneSource, WholeScenes

__all__ = ["warn_of_misfit"]

# A few views of a few scenes, whose images are decoded within a second or two.
SCENES, PAIRS = 3, 12


def warn_of_misfit(source: SceneSource) -> str | None:
    """Warn in words where cameras, depth and images of a data set certainly do not fit together; returns what is wrong.

    Scenes that are rendered here are right and not looked at. Nothing is said where the views cannot tell.

    Example:
        >>> import tempfile
        >>> from cameo.data import EmbeddedScenes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     warn_of_misfit(EmbeddedScenes(num_scenes=1, size=(8, 8), cache_dir=folder, progress=False))
    """
    if _is_rendered(source):
        return None
    try:
        check = check_views(source, scenes=SCENES, pairs=PAIRS, neighbors=False)
    except DataError as error:
        warnings.warn(f"it could not be checked whether cameras, depth and images fit together: {error}", stacklevel=3)
        return None
    if check.verdict != WRONG:
        return None
    warnings.warn(
        f"the data seems to be wrong: {check.words}. cameo check-data with the settings of this run shows it "
        "in pictures, and looks for more mistakes",
        stacklevel=3,
    )
    return check.words


def _is_rendered(source: SceneSource) -> bool:
    return isinstance(source.source if isinstance(source, WholeScenes) else source, EmbeddedScenes)
