"""When a run is found to train on nothing useful, on records as the trainer writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cameo.alarms import RunWatch
from cameo.alarms.watch import AT_CHANCE, FEW, FIRST, FIRST_COUNTED, WINDOW
from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.training.settings import TrainingConfig

LAYER = AttentionLayer(0, "mid_block.attn", heads=2, layout=TokenLayout("b (v h w)"))
CHANCE = math.log(64)
RUNS = Path(__file__).parents[2] / "benchmarks" / "results" / "convergence" / "tiny"


def watch_of(**settings: Any) -> RunWatch:
    return RunWatch([LAYER], TrainingConfig(**settings))


def step(loss: float = CHANCE, *, matches: int = 50, matchable: int = 128) -> dict[str, float]:
    chance = CHANCE if matches else 0.0
    return {
        "alignment_loss": loss if matches else 0.0,
        "alignment_chance": chance,
        "supervised": matches,
        "matchable": matchable,
    }


def words(watch: RunWatch) -> list[str]:
    return [alarm.word for alarm in watch.alarms()]


def test_the_rules_are_these() -> None:
    assert (WINDOW, FIRST, AT_CHANCE, FIRST_COUNTED, FEW) == (50, 150, 0.97, 20, 0.02)


def test_alignment_at_chance_from_a_step_on() -> None:
    watch = watch_of()
    watch.see([step()] * (FIRST - 1))
    assert words(watch) == []
    watch.see([step()])
    assert words(watch) == ["alignment at chance"]
    watch.see([step(CHANCE / 2)] * WINDOW)  # it has learned after all
    assert words(watch) == []


@pytest.mark.parametrize(("share", "rings"), [(AT_CHANCE + 0.001, True), (AT_CHANCE - 0.001, False), (1.7, True)])
def test_the_bound_of_chance(share: float, rings: bool) -> None:
    watch = watch_of()
    watch.see([step(0.1)] * (FIRST - WINDOW) + [step(share * CHANCE)] * WINDOW)  # only the last ones count
    assert bool(words(watch)) == rings


def test_a_warmup_is_waited_for() -> None:
    watch = watch_of(lr_scheduler="cosine", lr_warmup_steps=30)
    watch.see([step()] * (FIRST + 29))
    assert words(watch) == []
    watch.see([step()])
    assert words(watch) == ["alignment at chance"]


def test_steps_without_supervision_do_not_count() -> None:
    watch = watch_of()
    watch.see([step(matches=0, matchable=0), {"alignment_loss": 0.0, "supervised": 0.0}] * FIRST)
    assert words(watch) == []
    assert watch.words() == ""


def test_few_matches_from_a_step_on() -> None:
    watch = watch_of()
    watch.see([step(1.0, matches=2)] * (FIRST_COUNTED - 1))
    assert words(watch) == []
    watch.see([step(1.0, matches=2)])  # 1.6 %
    assert words(watch) == ["few matches"]
    watch.see([step(1.0, matches=3)] * WINDOW)  # 2.3 %
    assert words(watch) == []


def test_a_paragraph_says_what_was_seen_and_what_to_do() -> None:
    watch = watch_of(learning_rate=1e-7, min_overlap=0.05)
    watch.data_is_wrong = "it looks like OpenGL axes"
    watch.see([step(CHANCE, matches=1)] * FIRST)
    assert watch.words() == "alignment at chance, few matches, data check: wrong"
    chance, few, data = (alarm.paragraph("config=run/config.yaml") for alarm in watch.alarms())
    assert "after 150 supervised steps the alignment loss of mid_block.attn is 4.159, mean of the last 50" in chance
    assert "attention that looks everywhere alike has 4.159" in chance
    assert "learning_rate (1e-07)" in chance
    assert "The check of the data found a mistake" in chance
    assert "0.78% had one (1.0 a step); expected at least 2%" in few
    assert "min_overlap (0.05)" in few
    assert "do not fit together: it looks like OpenGL axes." in data
    for paragraph in (chance, few, data):
        assert "cameo check-data config=run/config.yaml" in paragraph
        assert "\n" not in paragraph


@pytest.mark.parametrize(
    ("arms", "at_chance"), [(("cameo", "linear", "loss_weight", "wrong_layer"), False), (("random",), True)]
)
def test_runs_that_were_measured(arms: tuple[str, ...], at_chance: bool) -> None:
    """The runs of benchmarks/convergence: with true matches none rings at any step, with random ones all do."""
    count = 0
    for path in RUNS.rglob("*.json"):
        run = json.loads(path.read_text())
        if not run["arm"].startswith(arms) or "other_scene" in run["arm"]:
            continue
        watch, count = watch_of(), count + 1
        chance = 4.304 if run["subject"] == "zero123plus" else CHANCE  # its reference view has a token grid of its own
        for last_step, _, loss in run["losses"]:  # means of ten steps
            entry = {**step(loss), "alignment_chance": chance} if loss else step(matches=0, matchable=0)
            watch.see([entry] * 10)
            assert words(watch) == (["alignment at chance"] if at_chance and last_step >= FIRST else []), (
                path,
                last_step,
            )
    assert count > 10
