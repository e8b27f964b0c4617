"""Every row of docs/models.md that names a repository, on a narrow random model of a checkout, by the page's line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from tests.helpers import attached_models as checks
from tests.helpers.attached_models import Attached
from tests.helpers.catalogue import REPOSITORIES, Row, noise, rows
from tests.helpers.models import SAMPLES
from tests.helpers.repositories import Entry, attach, check_footprint, seeded
from tests.helpers.repository_images import IMAGES
from tests.helpers.repository_videos import VIDEOS

ENTRIES = VIDEOS | IMAGES
ROWS = rows(REPOSITORIES)
ELSEWHERE = {
    "SEVA": "tests/upstream/test_seva.py",
    "MV-Adapter": "tests/upstream/test_mv_adapter.py",
    "Hunyuan-DiT, with joined views": "tests/adapters/test_hunyuan_dit.py",
}


@pytest.fixture(scope="module", params=ENTRIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def entry(name: str) -> Entry:
    return ENTRIES[name]


@pytest.fixture(scope="module")
def row(name: str) -> Row:
    return ROWS[name]


@pytest.fixture(scope="module")
def build(entry: Entry, upstream: Callable[[str], Path]) -> Iterator[Callable[[], nn.Module]]:
    with entry.open(upstream(entry.checkout)) as make:
        yield lambda: seeded(make)


@pytest.fixture(scope="module")
def attached(build: Callable[[], nn.Module], entry: Entry, row: Row) -> Attached:
    return attach(build(), entry, row)


def test_the_page_lists_these_models() -> None:
    assert list(ROWS) == [*ENTRIES, *ELSEWHERE]
    for name, file in ELSEWHERE.items():
        assert f"`{file}`" in ROWS[name].notes
        assert (Path(__file__).parents[2] / file).is_file()
    for name, entry in ENTRIES.items():
        says = "checkpointing" in ROWS[name].notes
        assert says == (entry.checkpoint is not None), name


def test_the_output_is_untouched(attached: Attached) -> None:
    checks.check_untouched(attached)


def test_one_match_pulls_its_query_and_what_that_reaches(attached: Attached, entry: Entry) -> None:
    check_footprint(attached, entry)


def test_the_layout_fits(attached: Attached, entry: Entry) -> None:
    latents = noise(SAMPLES, entry.views, *entry.latents)
    check = attached.model.check_layout(entry.inputs, latents, token_grids=(entry.grid,) * entry.views)
    assert check.fits, str(check)


def test_a_copy_has_the_same_loss(attached: Attached) -> None:
    checks.check_copy(attached)


def test_checkpointing_gives_the_same_gradients(
    build: Callable[[], nn.Module], attached: Attached, entry: Entry, row: Row
) -> None:
    if entry.checkpoint is None:
        pytest.skip("the model has no gradient checkpointing")
    model = build()
    again = attach(model, entry, row)
    calls: list[nn.Module] = []
    (layer,) = again.model.supervised_layers
    hook = model.get_submodule(layer.path).register_forward_pre_hook(lambda module, args: calls.append(module))
    checks.check_checkpointing(again, **entry.checkpoint(model))
    hook.remove()
    assert len(calls) == 2, "the layer was not computed again in the backward pass"


def test_a_lora_trains(attached: Attached, entry: Entry, row: Row) -> None:
    checks.check_lora(attached, row.targets, entry.many_matches())
