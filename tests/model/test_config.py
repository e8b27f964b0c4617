"""The settings of a wrapped model in `cameo_config.json`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cameo import TokenLayout
from cameo.config import CameoConfig
from cameo.errors import DataError
from cameo.wrap import attach
from tests.helpers.wrapped_models import Toy, toy

# As written before there were `inflate`, `kernel_call` and layouts with `references_last`.
FIRST_VERSION = """{
  "backbone": null, "base_model": null, "base_revision": null, "cameo_version": "0.1.0", "head": {"kind": "mlp"},
  "heads": null, "layers": ["blocks.1.attention"],
  "layout": {"key": "b (v h w)", "query": "b (v h w)", "unsupervised_views": 0},
  "normalise": "per_view", "num_reference_views": null, "reduction": "mean", "stride": 8, "training": {}, "weight": 0.02
}"""


def test_settings_survive_the_file(tmp_path: Path) -> None:
    config = toy(head={"kind": "mlp", "depth": 2}, stride=8, weight=0.5).cameo_config
    config.save(tmp_path)
    assert CameoConfig.load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["cameo_config.json"]
    again = attach(Toy(), CameoConfig.load(tmp_path))
    assert again.supervised_layers == toy(stride=8).supervised_layers


def test_settings_of_the_first_version_load(tmp_path: Path) -> None:
    (tmp_path / "cameo_config.json").write_text(FIRST_VERSION)
    model = attach(Toy(), CameoConfig.load(tmp_path))
    assert model.supervised_layers == toy(stride=8).supervised_layers
    assert (model.cameo_config.inflate, model.cameo_config.kernel_call) == (False, None)
    stored = {"query": "b (t + v h w)", "key": "b (t + v h w)", "unsupervised_views": 0, "t": 77}
    assert TokenLayout(**stored) == TokenLayout("b (t + v h w)", t=77)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"backbone": "cat3d"}', "key 'layers' is missing"),
        ('{"backbone": "cat3d", "layers": "mid"}', "layers: expected a list of module paths, got 'mid'"),
        ('{"backbone": null, "layers": [], "wieght": 1}', r"unknown key .* 'wieght': did you mean 'weight'\?"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cameo_config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        CameoConfig.load(tmp_path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; a folder saved by CameoModel\.save_pretrained"):
        CameoConfig.load(tmp_path / "cameo_config.json")
