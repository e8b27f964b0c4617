"""Old paths of modules, and of names in them, in imports, pickles and saved pipelines."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import TypeVar

import pytest
import torch

import cameo
from cameo import Correspondence
from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.renamed import KEYWORDS, MOVED, MOVED_NAMES, SETTINGS
from cameo.training.settings import TrainingConfig
from tests.helpers.models import JointModel
from tests.helpers.mvdream_models import with_image_tokens

T = TypeVar("T")
# Modules some of whose names are elsewhere today; the others are the very modules of today.
SPLIT = {name.rpartition(".")[0] for name in MOVED_NAMES}


def import_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_gives_the_new_one_and_says_so(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = importlib.import_module(MOVED[old])
    with pytest.warns(FutureWarning, match=f"^{re.escape(old)} is now {re.escape(MOVED[old])}; ") as warned:
        module = import_anew(old, monkeypatch)
    assert len([warning for warning in warned if old in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(old) is module  # a second import is silent
    assert (module is new) == (old not in SPLIT)
    assert all(getattr(module, name) is getattr(new, name) for name in new.__all__)


@pytest.mark.parametrize("old", MOVED_NAMES)
def test_what_left_an_old_module_is_found_through_it(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = old.rpartition(".")
    place, _, current = MOVED_NAMES[old].rpartition(".")
    with pytest.warns(FutureWarning, match=f"^{re.escape(module)} is now "):
        found = getattr(import_anew(module, monkeypatch), name)
    assert found is getattr(importlib.import_module(place), current)


def test_an_unknown_name_of_an_old_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cameo.adapters.sv3d_pipeline", raising=False)
    with pytest.warns(FutureWarning, match="sv3d_pipeline is now"):
        module = importlib.import_module("cameo.adapters.sv3d_pipeline")
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        module.nothing_of_this_name  # type: ignore[attr-defined]  # noqa: B018


def test_the_warning_points_at_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cameo.adapters.joint_dit", raising=False)
    with pytest.warns(FutureWarning, match="cameo.adapters.cat3d.denoiser; import it from there") as warned:
        import cameo.adapters.joint_dit  # noqa: F401
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.filterwarnings("ignore:.* is now:FutureWarning")
def test_a_pickle_with_an_old_path_loads() -> None:
    from cameo.adapters.cat3d.denoiser import JointDiT
    from cameo.adapters.sv3d.pipeline import SV3DPipeline

    assert pickle.loads(b"ccameo.adapters.joint_dit\nJointDiT\n.") is JointDiT
    assert pickle.loads(b"ccameo.adapters.sv3d_pipeline\nSV3DPipeline\n.") is SV3DPipeline


def pickled_by_an_earlier_release(current: T, names: dict[str, str]) -> T:
    """Pickle an object with the fields that `names` lists under their old names, and load it again."""
    new_to_old = {new: old for old, new in names.items()}
    earlier = object.__new__(type(current))
    vars(earlier).update({new_to_old.get(name, name): value for name, value in vars(current).items()})
    with warnings.catch_warnings(action="error"):
        loaded: T = pickle.loads(pickle.dumps(earlier))
    return loaded


def test_fields_are_found_in_a_pickle_under_their_old_names() -> None:
    config = CameoConfig("cat3d", ["mid"], normalize="all_views")
    assert pickled_by_an_earlier_release(config, KEYWORDS["CameoConfig"]) == config
    settings = TrainingConfig(hub_license="openrail", normalize="all_views", loss_weight=0.5)
    assert pickled_by_an_earlier_release(settings, SETTINGS) == settings
    match = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2), (2, 2)), match_weight=torch.ones(1, 2, 2, 4))
    loaded = pickled_by_an_earlier_release(match, KEYWORDS["Correspondence"])
    assert loaded.token_grids == match.token_grids
    assert loaded.match_weight is not None
    assert torch.equal(loaded.match_weight, match.match_weight)


def test_a_model_keeps_the_weight_that_an_earlier_release_pickled_beside_its_config() -> None:
    model = cameo.wrap(JointModel(), layer="joint", layout="b (v h w)")
    vars(model)["weight"] = 0.5
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.weight == loaded.cameo_config.weight == 0.5
    assert model.weight == CameoConfig.weight


@pytest.mark.parametrize(
    ("backbone", "preset", "old", "new"),
    [
        ("cat3d", "transformer-tiny", ["cameo.adapters.joint_dit", "JointDiT"], "cameo.adapters.cat3d.denoiser"),
        ("mvdream", None, ["cameo.adapters.mvdream_unet", "ImageDreamUNet"], "cameo.adapters.mvdream.denoiser"),
        ("sv3d", "tiny", ["cameo.adapters.sv3d_unet", "SV3DUNet"], "cameo.adapters.sv3d.denoiser"),
    ],
    ids=["cat3d", "mvdream", "sv3d"],
)
def test_a_pipeline_saved_with_an_old_path_loads(
    backbone: str, preset: str | None, old: list[str], new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = get_backbone(backbone)
    saved = adapter.build(preset) if preset else with_image_tokens()
    saved.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == [new, old[1]]  # what is written
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "unet": old}))
    monkeypatch.delitem(sys.modules, old[0], raising=False)
    with pytest.warns(
        FutureWarning, match=rf"unet is a {old[0]}\.{old[1]}, which is now {new}\.{old[1]}; save the pipeline again"
    ):
        loaded = adapter.load(str(tmp_path))
    assert type(loaded.unet) is type(saved.unet)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["unet"] == [new, old[1]]
    expected = saved.unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.unet.state_dict().items())
