"""What is written into the page is what the library itself says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cameo.data.batches import layer_grids, match_batch
from cameo.evaluation.match_errors import find_matches
from cameo.explore.packing import Kept, Pack
from cameo.explore.write import SEED, ShownModel, write_page
from cameo.probing.denoising import fixed_inputs
from tests.helpers.explored import LEVELS, Page, unpacked


def facts_of(page: Page) -> dict[str, Any]:
    text = page.path.read_text("utf-8")
    return json.loads(re.findall(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)[0])


def packed(page: Page, facts: dict[str, Any]) -> Pack:
    text = re.findall(r'<script type="text/plain" id="maps">(.*?)</script>', page.path.read_text("utf-8"), re.DOTALL)[0]
    pack = Pack(Kept(facts["keys"], facts["step"]))
    pack.text = lambda: text  # type: ignore[method-assign]
    return pack


def test_maps_and_matches_are_those_of_the_model(page: Page) -> None:
    facts = facts_of(page)
    pack = packed(page, facts)
    records = {
        tuple(record[name] for name in ("model", "level", "readout", "sample", "query", "key")): record
        for record in facts["maps"]
    }
    assert len(records) == len(facts["maps"])
    seen = 0
    for level_number, level in enumerate(LEVELS):
        for one in page.maps(level):
            for readout, shares in one.readouts.items():
                place = (1, level_number, facts["readouts"].index(readout), one.sample, one.query_view, one.key_view)
                best, _, _ = unpacked(pack, records[place], *shares.shape)
                assert best.tolist() == shares.argmax(-1).tolist()
                seen += 1
            assert facts["truth"]["0"][str(one.sample)][f"{one.query_view}/{one.key_view}"] == one.target.tolist()
    # Two levels, two scenes, six ordered pairs of three views, and every readout.
    assert seen == 2 * 2 * 6 * len(facts["readouts"])
    heads = [f"head {number}" for number in range(page.model.supervised_layers[0].heads)]
    assert facts["readouts"] == ["mean", "through the alignment head", *heads]


def test_the_pictures_of_a_recipe_agree(page: Page) -> None:
    """`find_matches` draws attention.png; it reads one pair of views on a way of its own."""
    inputs = fixed_inputs(page.pipeline, page.batch, range(2), 1.0, SEED)
    found = find_matches(page.model, page.batch, inputs, through_head=False)
    of_page = [one for one in page.maps(1.0) if (one.query_view, one.key_view) == (found.query_view, found.key_view)]
    assert len(of_page) == 2
    for one in of_page:
        assert one.readouts["mean"].argmax(-1).tolist() == found.found[one.sample].tolist()
        assert one.target.tolist() == found.target[one.sample].tolist()


def test_targets_are_the_matches_of_the_batch(page: Page) -> None:
    layer = page.model.supervised_layers[0]
    match = match_batch(page.batch, layer_grids(layer, page.batch))
    for one in page.maps(0.5):
        tokens = one.query_grid[0] * one.query_grid[1]
        assert one.target.tolist() == match.index[one.sample, one.query_view, one.key_view, :tokens].tolist()


def test_the_base_is_another_model(page: Page) -> None:
    facts = facts_of(page)
    assert facts["models"] == ["base", "with <CAMEO> & co"]
    pack = packed(page, facts)
    by_model: dict[int, list[Any]] = {0: [], 1: []}
    grids = facts["layers"][0]["grids"]
    for record in facts["maps"]:
        if facts["readouts"][record["readout"]] == "mean":
            (height, width), (rows, columns) = (grids[str(record[name])] for name in ("query", "key"))
            by_model[record["model"]].append(unpacked(pack, record, height * width, rows * columns)[2])
    assert len(by_model[0]) == len(by_model[1]) == 24
    assert any((base != trained).any() for base, trained in zip(by_model[0], by_model[1], strict=True))


def test_one_file_without_anything_from_outside(page: Page) -> None:
    text = page.path.read_text("utf-8")
    assert "<title>A &lt;page&gt;</title>" in text
    assert "<CAMEO>" not in text  # names cannot end the script they stand in
    assert "default-src 'none'" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "@" not in re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.DOTALL).split("<script>")[0]


def test_layers_that_have_no_maps_are_refused(page: Page) -> None:
    layer = replace(page.model.supervised_layers[0], unsupported="its tokens are mixed")
    with pytest.raises(ValueError, match=r"across whole views, got .*its tokens are mixed"):
        write_page(
            page.path, {"one": ShownModel(page.model, True)}, page.pipeline, page.batch, title="", layers=[layer]
        )
    with pytest.raises(ValueError, match="expected at least one model"):
        write_page(page.path, {}, page.pipeline, page.batch, title="")
    with pytest.raises(ValueError, match="noise_levels"):
        write_page(
            page.path, {"one": ShownModel(page.model, True)}, page.pipeline, page.batch, title="", noise_levels=[2]
        )


def test_the_model_is_left_as_it_was(page: Page, tmp_path: Any) -> None:
    page.model.train()
    gradients = [weight.requires_grad for weight in page.model.parameters()]
    state = {name: value.clone() for name, value in page.model.state_dict().items()}
    write_page(
        tmp_path / "again.html",
        {"base": ShownModel(page.model, False, base=True)},
        page.pipeline,
        page.batch,
        title="x",
    )
    assert page.model.training
    assert [weight.requires_grad for weight in page.model.parameters()] == gradients
    assert all(torch.equal(value, state[name]) for name, value in page.model.state_dict().items())
