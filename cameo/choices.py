"""Names that settings choose from, in a module of their own so that settings can be read without torch."""

from __future__ import annotations

__all__ = [
    "GELUS",
    "HEAD_KINDS",
    "IMPLEMENTATIONS",
    "LPIPS_TRUNKS",
    "MESH_SUFFIXES",
    "NORMALIZATIONS",
    "POSED_FORMATS",
    "REDUCTIONS",
    "RIG_NAMES",
    "ROOM_RIG_NAMES",
]

# Of the alignment head and loss, see `cameo.AlignmentHead` and `cameo.alignment_loss`.
HEAD_KINDS = ("mlp", "mean", "none")
NORMALIZATIONS = ("per_view", "all_views")
REDUCTIONS = ("mean", "sum", "released")
IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
GELUS = ("exact", "fast")
# Of `cameo.data.RIGS`.
RIG_NAMES = ("zero123plus-v1.1", "zero123plus-v1.2", "mvdream", "imagedream", "sv3d-orbit", "sv3d-dynamic")
# Of the rigs that stand in rooms, see `cameo.data.RoomRig`.
ROOM_RIG_NAMES = ("fan",)
# Of the posed images that `cameo.data.open_views` reads, in the order in which it looks for them.
POSED_FORMATS = ("nerfstudio", "colmap", "co3d", "rgbd", "realestate10k", "webdataset", "zero123")
# Of the files that `cameo.scenes.meshes` reads.
MESH_SUFFIXES = (".glb", ".obj", ".ply")
# Networks behind LPIPS, of `cameo.evaluation.metrics`.
LPIPS_TRUNKS = ("alex", "vgg", "squeeze")
