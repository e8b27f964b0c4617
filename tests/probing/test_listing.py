"""The list of layers, as Python and as a command."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from torch import nn

from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.backbone import Backbone, get_backbone
from cameo.probing.listing import layer_table

RECIPE = Path(__file__).parents[2] / "recipes" / "probe_layers.py"


class Mixed(Backbone):
    """Layers of every kind that the table can show."""

    name = "mixed"

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        own_grid = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", references_last=1, r=3, c=2)
        return [
            AttentionLayer(0, "tiles", 8, own_grid, stride=16, reference_size=(512, 512)),
            AttentionLayer(1, "rows", 4, TokenLayout("(b h) (v w)"), stride=16),
            AttentionLayer(2, "cells", 4, TokenLayout("(b h w) v"), stride=32),
            AttentionLayer(3, "masked", 4, TokenLayout("b (v h w)"), unsupported="its attention is masked"),
        ]

    def default_layer(self, model: nn.Module) -> int:
        return 1

    def inflatable_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return [AttentionLayer(0, "spatial", 4, TokenLayout("b (v h w)"), stride=8)]


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {line[1]: line for line in cells if line[1] not in ("module", "---")}


def test_every_kind_of_layer() -> None:
    found = rows(layer_table(Mixed(), nn.Linear(1, 1), height=320, width=256, num_views=7))
    assert found["tiles"] == ["0", "tiles", "8", "32 x 32 (1x), 20 x 16 (6x)", "all", "yes"]
    assert found["rows"] == ["1 (default)", "rows", "4", "20 x 16", "row", "yes"]
    assert found["cells"][3:5] == ["10 x 8", "cell"]
    assert found["cells"][5].startswith('yes, normalize="all_views": a query reaches one token per view')
    assert found["masked"][3:] == ["not known", "all", "no: its attention is masked"]
    assert found["spatial"][5] == "yes, inflate=True"


def test_a_backbone_without_a_default_layer() -> None:
    class NoDefault(Mixed):
        default_layer = Backbone.default_layer

    table = layer_table(NoDefault(), nn.Linear(1, 1), height=320, width=256, num_views=7)
    assert list(rows(table)) == ["tiles", "rows", "cells", "masked", "spatial"]
    assert "(default)" not in table


def test_two_views_leave_a_temporal_layer_nothing_to_learn() -> None:
    found = rows(layer_table(Mixed(), nn.Linear(1, 1), height=64, width=64, num_views=2))
    assert found["cells"][5] == "no: with 2 views a query reaches one token of other views, so the softmax is constant"


@pytest.mark.parametrize("backbone", ["cat3d", "mvdream", "sv3d", "zero123plus"])
def test_the_command_lists_the_layers_of_each_backbone(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(RECIPE))["main"](["--list", f"backbone={backbone}"])
    printed = capsys.readouterr().out
    adapter = get_backbone(backbone)
    denoiser = adapter.load(f"bundled:{backbone}-tiny").denoiser
    found = rows(printed)
    assert list(found) == [
        layer.path for layer in [*adapter.attention_layers(denoiser), *adapter.inflatable_layers(denoiser)]
    ]
    assert printed.startswith(f"{backbone}: {type(denoiser).__name__}, ")
    assert found[adapter.attention_layers(denoiser)[adapter.default_layer(denoiser)].path][0].endswith("(default)")
    assert not any("not known" in cell for line in found.values() for cell in line)


def test_the_command_lists_the_layers_of_a_model_in_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get_backbone("mvdream").build("tiny").save_pretrained(tmp_path)
    runpy.run_path(str(RECIPE))["main"](["--list", "backbone=mvdream", f"pretrained_model_name_or_path={tmp_path}"])
    assert "(default)" in capsys.readouterr().out


def test_the_command_refuses_what_listing_does_not_use() -> None:
    with pytest.raises(ValueError, match="only lists the layers; leave out layers, perturb"):
        runpy.run_path(str(RECIPE))["main"](["--list", "--perturb", "layers=1", "backbone=cat3d"])
