"""The table, the picture, the recipe, and the warning at the start of a training."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
from PIL import Image

from cameo.data import EmbeddedScenes, RGBDSequence, Views
from cameo.inspection import DataCheck, check_views
from cameo.inspection.at_start import warn_of_misfit
from cameo.inspection.readings import AS_GIVEN
from cameo.training import trainer
from tests.helpers import data_faults as faults
from tests.helpers.training_runs import RECIPES, make_trainer, scene_cache


@pytest.fixture(scope="module")
def sequence(room: Views, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.write_seven_scenes(room, tmp_path_factory.mktemp("data") / "right")


@pytest.fixture(scope="module")
def opengl_sequence(room: Views, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.write_seven_scenes(faults.in_opengl_axes(room), tmp_path_factory.mktemp("data") / "opengl")


def test_the_picture_shows_the_pairs_as_given_and_as_they_look_like(room: Views, tmp_path: Path) -> None:
    right, wrong = check_views(room, pairs=3), check_views(faults.in_opengl_axes(room), pairs=15)
    labels = [axis.get_ylabel() for axis in wrong.figure(pairs=1).axes]
    assert labels.count("as given") == labels.count("as it looks like") == 1
    assert [axis.get_ylabel() for axis in right.figure(pairs=2).axes].count("as given") == 2
    titles = " ".join(axis.get_title() for axis in wrong.figure(pairs=1).axes)
    assert "warped, 0% matched" in titles
    path = wrong.draw(tmp_path / "check.png", pairs=1)
    assert min(Image.open(path).size) > 200
    with pytest.raises(ValueError, match="pairs: expected at least 1"):
        right.figure(pairs=0)
    with pytest.raises(ValueError, match="got 2 and 0 scenes"):
        DataCheck("agrees", "", AS_GIVEN, pairs=()).figure()


def test_the_picture_of_depth_that_is_not_registered_shows_its_edges(room: Views) -> None:
    check = check_views(faults.depth_moved(room, 3), pairs=15)
    titles = [axis.get_title() for axis in check.figure(pairs=1).axes]
    assert titles.count("edges of depth, as given") == titles.count("edges of depth, moved") == 2


def test_the_table_has_a_row_for_each_pair(room: Views) -> None:
    check = check_views(room, pairs=15)
    assert len(check.pairs) == 15
    assert check.table(most=5).count("\n") == 6
    first = check.pairs[0]
    assert (first.key, first.views) == (room.key, (0, 1))
    assert f"| {room.key} | 0 and 1 | {first.matched:.1%} |" in check.table()
    centers = -room.extrinsics[:2, :3, :3].mT @ room.extrinsics[:2, :3, 3:]
    assert first.baseline == pytest.approx((centers[0] - centers[1]).norm().item(), rel=1e-5)
    assert first.depth == pytest.approx(room.depth[:2].median().item())


def run_recipe(folder: Path, output: Path) -> int:
    arguments = [f"train_data_dir={folder}", "resolution=48", "num_views=2", f"output={output}", "pictures=1"]
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / "check_data.py"))["main"](arguments)
    return int(ended.value.code or 0)


def test_the_recipe_ends_with_the_status_of_the_verdict(
    sequence: Path, opengl_sequence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe(sequence, tmp_path / "right") == 0
    printed = capsys.readouterr().out
    assert "\nagrees: " in printed
    assert "Never seen: " in printed
    assert sorted(path.name for path in (tmp_path / "right").iterdir()) == ["check.png", "table.md"]
    assert (tmp_path / "right" / "table.md").read_text() in printed
    assert run_recipe(opengl_sequence, tmp_path / "wrong") == 1
    assert "wrong: it looks like OpenGL axes" in capsys.readouterr().out


def test_a_training_warns_of_wrong_data_and_of_nothing_else(sequence: Path, opengl_sequence: Path) -> None:
    with warnings.catch_warnings(action="error"):
        warn_of_misfit(RGBDSequence(sequence, (48, 48)))
        rendered = {"num_scenes": 1, "views_per_scene": 6, "size": (48, 48), "progress": False}
        warn_of_misfit(EmbeddedScenes(cache_dir=scene_cache(), **rendered))
    with pytest.warns(UserWarning, match=r"the data seems to be wrong: it looks like OpenGL axes.*cameo check-data"):
        warn_of_misfit(RGBDSequence(opengl_sequence, (48, 48)))
    with pytest.warns(UserWarning, match="could not be checked.*expected at least 2"):
        warn_of_misfit(RGBDSequence(sequence, (48, 48), stride=6))


def test_the_trainer_checks_its_data_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    checked: list[object] = []
    monkeypatch.setattr(trainer, "warn_of_misfit", checked.append)
    run = make_trainer(tmp_path, max_train_steps=1, target_modules=["to_q"])
    run.train()
    assert checked == [run.dataset.source]
