"""Settings: text stays as it was typed, types and bounds come from the fields, and no secret is ever shown."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import cameo
from cameo import choices
from cameo.errors import DataError
from cameo.evaluation.run_settings import run_settings
from cameo.evaluation.settings import EvaluationSettings
from cameo.settings import Settings, run_recipe, setting, shown_settings, split_arguments, to_yaml, typed_values
from cameo.settings.help import comments, components, help_text
from cameo.settings.text import guess, parse_yaml
from cameo.training.checkpoint import check_continues
from cameo.training.config import RENAMED, TrainingConfig, continued_settings, load_config, save_config
from cameo.training.processes import start_trackers

ROOT = Path(__file__).parent.parent
RECIPES = ("lora_finetune", "full_finetune", "evaluate", "probe_layers", "precompute_correspondence")
TOKEN = "hf_topsecret"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\n")
    return path


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


# 1. Text stays the text that was typed

TEXTS = [
    ("mixed_precision", "no"),
    ("revision", "7e41298"),
    ("revision", "1e3"),
    ("revision", "0123"),
    ("revision", "true"),
    ("revision", "12:30"),
    ("revision", "2026-11-28"),
    ("revision", "nullable"),
    ("train_data_dir", "/data/scan #1"),
    ("train_data_dir", "/data/my scan: v2"),
    ("train_data_dir", "/data/[old]"),
    ("output_dir", "runs/a=b"),
    ("hub_model_id", "me/{rooms}"),
]


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_text_stays_as_it_was_typed(file: Path, name: str, text: str) -> None:
    for arguments in ([f"{name}={text}"], [f"--{name}={text}"], [f"--{name}", text]):
        assert getattr(load_config(file, arguments), name) == text
    quoted = load_config(write(file, f"{name}: '{text}'\n"))
    assert getattr(quoted, name) == text
    if not re.search(r" #|: ", text):  # YAML's own signs need quotes
        assert getattr(load_config(write(file, f"{name}: {text}\n")), name) == text
    save_config(quoted, file)
    assert getattr(load_config(file), name) == text
    assert yaml.safe_load(file.read_text())[name] == text  # for any other reader too


@pytest.mark.parametrize("text", ["null", "None", "~", "", "Null"])
def test_null_is_none_where_a_setting_may_be_none(file: Path, text: str) -> None:
    write(file, "camera_rig: sv3d-orbit\nnum_views: 5\n")
    assert load_config(file, [f"camera_rig={text}"]).camera_rig is None
    assert load_config(write(file, f"revision: {text}\n")).revision is None
    assert load_config(file, [f"report_to={text}"]).report_to == "none"
    assert load_config(file, [f"correspondence_control={text}"]).correspondence_control == "none"
    for name in ("output_dir", "rank", "use_ema", "learning_rate", "lr_scheduler", "target_modules", "backbone"):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got null$"):
            load_config(file, [f"{name}={text}"])


def test_a_quoted_null_is_a_text(file: Path) -> None:
    assert load_config(write(file, 'revision: "null"\n')).revision == "null"
    save_config(load_config(file), file)
    assert load_config(file).revision == "null"


def test_the_home_folder_in_paths(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"train_data_dir": "~/data", "output_dir": "~/runs", "feature_checkpoint": "~/vit.safetensors"}
    text = "".join(f"{name}: {value}\n" for name, value in given.items())
    for config in (
        load_config(write(file, text)),
        load_config(write(file, "seed: 1\n"), [f"{name}={value}" for name, value in given.items()]),
        TrainingConfig(**given),
    ):
        for name, value in given.items():
            assert getattr(config, name) == value.replace("~", "/home/me")
    assert load_config(file, ["revision=~x"]).revision == "~x"  # no path
    assert load_config(file, ["train_data_dir=~"]).train_data_dir is None  # null, as YAML has it


# 2. Ways to write a setting


def test_ways_to_write_a_setting(file: Path) -> None:
    arguments = ["rank=8", "--seed=3", "--max_train_steps", "20", "--train-batch-size", "2", "--use_ema"]
    config = load_config(file, [*arguments, "--push_to_hub", "false", "--lr_scheduler", "cosine"])
    assert (config.rank, config.seed, config.max_train_steps, config.train_batch_size) == (8, 3, 20, 2)
    assert (config.use_ema, config.push_to_hub, config.lr_scheduler) == (True, False, "cosine")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("layer=10", 10),
        ("layer=auto", "auto"),
        ("layer=mid_block.attentions.0", "mid_block.attentions.0"),
        ("layer=[0, mid.1]", [0, "mid.1"]),
        ("layer=0,mid.1", [0, "mid.1"]),
        ("target_modules=[to_q,to_k]", ["to_q", "to_k"]),
        ("target_modules=to_q", ["to_q"]),
        ("head={kind: mlp, depth: 2}", {"kind": "mlp", "depth": 2}),
        ("preset_options={norm: no, width: [1, 2.5], joint: true}", {"norm": "no", "width": [1, 2.5], "joint": True}),
        ("preset_options.block.width=8", {"block": {"width": 8}}),
        ("intrinsics=[[60,0,32],[0,60,24],[0,0,1]]", [[60, 0, 32], [0, 60, 24], [0, 0, 1]]),
        ("learning_rate=1", 1.0),
        ("use_ema=yes", True),
        ("hub_private=off", False),
    ],
)
def test_values_have_the_type_of_their_field(file: Path, argument: str, value: Any) -> None:
    name = argument.partition("=")[0].partition(".")[0]
    found = getattr(load_config(file, [argument]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate"], r"--learning_rate: expected a value after it, as in learning_rate=value"),
        (["--learning_rate", "--use_ema"], r"--learning_rate: expected a value after it"),
        (["--dry-run"], r"unknown setting 'dry_run'"),
        (["mvdream"], r"argument 'mvdream': expected key=value.*--help lists all settings"),
        (["rank=1.5"], r"rank: expected a whole number, got '1.5'"),
        (["layer={a: 1}"], r"layer: expected a whole number, a text, a list \[a, b\] or null, got '\{a: 1\}'"),
        (["head=3"], r"unknown head '3'.*mean, mlp, none"),
        (["target_modules={a: 1}"], r"target_modules: expected a list \[a, b\], got '\{a: 1\}'"),
        (["preset_options=wide"], r"preset_options: expected \{key: value\}, got 'wide'"),
        (["intrinsics=[[1,2],[3,4]]"], r"intrinsics: expected 3 rows of 3 numbers"),
    ],
)
def test_wrong_arguments_are_named(file: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, arguments)


@dataclass
class Options(Settings):
    """Options of a recipe."""

    # Results to compare. None by default.
    results: list[str] = setting(factory=list, positional=True)
    # Whether to compare. false by default.
    compare: bool = setting(False)
    # Folder of the result. null by default.
    output: str | None = setting(None, path=True)


def test_arguments_are_sorted_by_the_dataclass_that_has_them() -> None:
    given = ["--compare", "runs/lr=1e-3", "runs/b", "output=c", "num_inference_steps=10", "seed=1", "config=my.yaml"]
    options, evaluation, settings = split_arguments(given, Options, EvaluationSettings, TrainingConfig)
    assert options == {"compare": "true", "results": ["runs/lr=1e-3", "runs/b"], "output": "c"}
    assert evaluation == {"num_inference_steps": "10"}  # the first that has it
    assert settings == {"seed": "1", "config": "my.yaml"}
    assert Options(**typed_values(Options, options)).results == ["runs/lr=1e-3", "runs/b"]


# 3. Bounds


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", "inf", "expected a finite number, got inf"),
        ("loss_weight", "inf", "expected a finite number, got inf"),
        ("adam_weight_decay", "inf", "expected a finite number, got inf"),
        ("max_grad_norm", "inf", "expected a finite number, got inf"),
        ("min_overlap", "nan", "expected a finite number, got nan"),
        ("min_overlap", "2", r"expected a share in \[0, 1\], got 2.0"),
        ("max_overlap", "-0.1", r"expected a share in \[0, 1\], got -0.1"),
        ("seed", "100000000000000000000", "expected a whole number of at most 64 bits"),
        ("resolution", "-64", "expected at least 1, got -64"),
        ("depth_scale", "-1", "expected a number > 0, got -1.0"),
        ("condition_dropout", "1", r"expected a share in \[0, 1\), got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(file: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        load_config(file, [f"{name}={value}"])
    kind = int if name in ("seed", "resolution") else float
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        TrainingConfig(**{name: kind(value)})


def test_a_minimum_above_its_maximum_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"^min_overlap=0.8: expected at most max_overlap=0.4; give both"):
        load_config(file, ["min_overlap=0.8", "max_overlap=0.4"])
    assert load_config(file, ["min_overlap=0.5", "max_overlap=0.5"]).min_overlap == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": "4"}, "rank: expected a whole number, got '4'"),
        ({"rank": True}, "rank: expected a whole number, got True"),
        ({"use_ema": 1}, "use_ema: expected true or false, got 1"),
        ({"output_dir": None}, "output_dir: expected a text, got None"),
        ({"head": 3}, r"head: expected a text or \{key: value\}, got 3"),
        ({"layer": {"a": 1}}, r"layer: expected a whole number, a text, a list \[a, b\] or null, got \{'a': 1\}"),
        ({"layer": [0.5]}, r"layer: expected"),
    ],
)
def test_values_of_another_type_are_refused_in_python(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**given)


def test_values_of_numpy_and_paths_are_taken() -> None:
    import numpy as np

    given = {"layer": np.int64(3), "learning_rate": np.float32(0.5), "intrinsics": np.eye(3), "output_dir": Path("a/b")}
    config = TrainingConfig(**given, report_to=None)
    assert (config.layer, config.learning_rate, config.intrinsics[1], config.output_dir, config.report_to) == (
        3,
        0.5,
        [0.0, 1.0, 0.0],
        "a/b",
        "none",
    )
    assert type(config.layer) is int


# 4. Files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"3\n", "expected lines of `key: value`, got a text"),
        (b"- 1\n", "expected lines of `key: value`, got a list"),
        (b"output_dir: \xff\xfe\n", "is not text in UTF-8"),
        (b"null: 1\n", r"not valid YAML \(line 1: expected a name before `:`\)"),
        (b"? [a]\n: 1\n", "expected a name before `:`"),
        (b"seed: 1\nseed: 2\n", r"not valid YAML \(line 2: seed is given twice\)"),
        (b"seed: [1\n", "not valid YAML"),
        (b"seed: one\n", r"seed: expected a whole number, got 'one'"),
        (b"sed: 1\n", r"unknown setting 'sed': did you mean 'seed'"),
        (b"seed: &a [*a]\n", "seed|not valid YAML"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.yaml: .*{message}"):
        load_config(path)


def test_yaml_features_that_files_may_use(file: Path) -> None:
    text = "\ufeff# settings\r\npreset_options: &wide {width: 8}\r\nseed: 3 # the third\r\n"
    assert load_config(write(file, text)).seed == 3
    assert load_config(write(file, "")).seed == 0
    assert load_config(write(file, "preset_options: {<<: {width: 8}, depth: 1}\n")).preset_options == {
        "width": 8,
        "depth": 1,
    }


def test_written_values_are_read_back_by_every_reader() -> None:
    values = {
        "texts": ["no", "1e3", "null", "~", "None", "a: b", "a #1", "", "0x1", ".inf", "é", "- a", "12:30", "y\nz"],
        "numbers": [1e-8, 4, 0.5, True, None],
        "deep": {"a": {"b": [1]}},
    }
    assert yaml.safe_load(to_yaml(values)) == values
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(values))) == values  # for it 1e3 is a number
    assert guess(parse_yaml(to_yaml(values))) == values


# 5. Old names


def test_old_names_are_accepted_everywhere(file: Path, tmp_path: Path) -> None:
    values = {"weight": 0.5, "normalise": "all_views", "hub_licence": "openrail"}
    assert values.keys() == RENAMED.keys()
    write(file, "".join(f"{name}: {value}\n" for name, value in values.items()))
    ways = [
        lambda: load_config(file),
        lambda: load_config(write(tmp_path / "b.yaml", ""), [f"{name}={value}" for name, value in values.items()]),
        lambda: TrainingConfig(**values),
        lambda: replace(TrainingConfig(), **values),
    ]
    for way in ways:
        with pytest.warns(FutureWarning, match="the setting weight is now called loss_weight"):
            config = way()
        assert [getattr(config, name) for name in RENAMED.values()] == list(values.values())
    for old, new in RENAMED.items():
        with pytest.warns(FutureWarning, match=f"the setting {old} is now called {new}"):
            assert getattr(config, old) == getattr(config, new)
        with pytest.warns(FutureWarning, match=old):
            setattr(config, old, None)
        assert getattr(config, new) is None
    assert not hasattr(config, "wait")


def test_a_setting_under_both_names_is_refused(file: Path) -> None:
    message = "weight: is the old name of loss_weight, and both are given; leave out weight"
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=message):
        load_config(write(file, "weight: 0.1\nloss_weight: 0.2\n"))
    with pytest.warns(FutureWarning):  # the command line wins, under whichever name
        assert load_config(write(file, "weight: 0.1\n"), ["loss_weight=0.2"]).loss_weight == 0.2


def test_a_checkpoint_with_old_names_continues(tmp_path: Path) -> None:
    settings = continued_settings(TrainingConfig(loss_weight=0.1))
    old = {new: name for name, new in RENAMED.items()}
    older = {old.get(name, name): value for name, value in settings.items()}
    assert "weight" in older
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "settings": older}))
    with warnings.catch_warnings(action="error"):
        assert check_continues(tmp_path, settings, 10) == 3
    with pytest.raises(ValueError, match=r"loss_weight: 0.1 -> 0.5"):
        check_continues(tmp_path, {**settings, "loss_weight": 0.5}, 10)


def test_settings_saved_before_the_renaming_load() -> None:
    saved = ROOT / "adapters" / "weights" / "cat3d-transformer-tiny" / "training.yaml"
    with pytest.warns(FutureWarning):
        config = load_config(saved)
    assert (config.loss_weight, config.max_train_steps, config.mixed_precision) == (0.0, 1200, "no")


def test_the_default_weight_is_that_of_wrap() -> None:
    import inspect

    assert TrainingConfig().loss_weight == inspect.signature(cameo.wrap).parameters["weight"].default == 0.02


# 6. Secrets and interpolations


@pytest.mark.parametrize(
    "arguments",
    [
        [f"hub_token={TOKEN}", "max_train_steps=x"],
        [f"hub_token=[{TOKEN}]", "max_train_steps=x"],
        [f"hub_token={TOKEN}", "learning_rate=nan"],
        [f"hub_token={TOKEN}", "head={kind: mlp"],
        [f"hub_token.a={TOKEN}"],
        [f"--hub_token.a={TOKEN}"],
        ["hub_token=", TOKEN],
        ["--hub_token", "--seed", TOKEN],
        ["hub_token", TOKEN],
        [TOKEN],
        [f"hub_tokn={TOKEN}"],
        [f"--hub-token={TOKEN}", "rank=x"],
        ["push_to_hub=true", f"hub_token={TOKEN}"],
    ],
)
def test_no_error_shows_the_token(file: Path, arguments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - any message that does not show it
        load_config(file, arguments)
    assert TOKEN not in str(caught.value)
    write(file, f"hub_token: {TOKEN}: x\nseed: [\n")
    with pytest.raises(DataError) as caught:
        load_config(file)
    assert "topsecret" not in str(caught.value)


def test_nothing_shows_the_token(file: Path) -> None:
    config = load_config(file, [f"hub_token={TOKEN}"])
    assert config.hub_token == TOKEN
    assert TOKEN not in repr(config)
    assert TOKEN not in to_yaml(shown_settings(config))
    with pytest.raises(ValueError, match="hub_token: expected a text or null, got a value that is not shown"):
        TrainingConfig(hub_token=[TOKEN])


@pytest.fixture
def interpolated(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAMEO_TEST_SECRET", TOKEN)
    monkeypatch.setenv("CAMEO_TEST_STEPS", "20")
    return write(
        file,
        "output_dir: ${oc.env:CAMEO_TEST_SECRET}/${backbone}-${rank}\n"
        "revision: ${oc.env:CAMEO_TEST_SECRET}\n"
        "max_train_steps: ${oc.env:CAMEO_TEST_STEPS}\n"
        "preset_options: {deep: ['${oc.env:CAMEO_TEST_SECRET}'], steps: '${max_train_steps}'}\n"
        "tracker_project_name: \\${kept}\n",
    )


def test_interpolations_are_used_resolved_and_written_as_typed(interpolated: Path, tmp_path: Path) -> None:
    config = replace(load_config(interpolated, ["rank=8"]), seed=1)  # as for the runs of a comparison
    assert config.output_dir == f"{TOKEN}/cat3d-8"
    assert (config.revision, config.max_train_steps) == (TOKEN, 20)
    assert config.preset_options == {"deep": [TOKEN], "steps": 20}
    assert config.tracker_project_name == "${kept}"
    seen: dict[str, Any] = {}

    class Accelerator:
        def init_trackers(self, name: str, config: dict[str, Any]) -> None:
            seen.update(config)

    start_trackers(Accelerator(), config)
    saved = tmp_path / "saved.yaml"
    save_config(config, saved)
    texts = [saved.read_text(), json.dumps([continued_settings(config), seen, shown_settings(config)])]
    assert all("topsecret" not in text for text in texts)
    assert "${oc.env:CAMEO_TEST_SECRET}" in texts[0]
    assert load_config(saved) == config
    plain = replace(config, output_dir="elsewhere")
    save_config(plain, saved)
    assert load_config(saved).output_dir == "elsewhere"


def test_a_resumed_run_notices_that_a_variable_has_changed(
    interpolated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = continued_settings(load_config(interpolated))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "settings": settings}))
    assert check_continues(tmp_path, continued_settings(load_config(interpolated)), 30) == 3
    monkeypatch.setenv("CAMEO_TEST_SECRET", "other")
    with pytest.raises(ValueError, match=r"revision: \$\{oc.env:CAMEO_TEST_SECRET\} \(\w+\) -> ") as caught:
        check_continues(tmp_path, continued_settings(load_config(interpolated)), 30)
    assert "topsecret" not in str(caught.value)


def test_interpolations_of_a_file_beside_a_checkpoint_are_left_as_text(interpolated: Path) -> None:
    with pytest.warns(UserWarning, match=r"interpolations in output_dir, revision, .* left as text"):
        config = load_config(interpolated, ["max_train_steps=5", "hub_model_id=${backbone}/x"], interpolate=False)
    assert config.revision == "${oc.env:CAMEO_TEST_SECRET}"
    assert config.preset_options["deep"] == ["${oc.env:CAMEO_TEST_SECRET}"]
    assert config.hub_model_id == "cat3d/x"  # the user's own
    with (
        pytest.warns(UserWarning, match="left as text"),
        pytest.raises(
            ValueError, match=r"max_train_steps: expected a whole number, got .*Give max_train_steps= itself"
        ),
    ):
        load_config(interpolated, interpolate=False)


def test_the_settings_found_beside_a_checkpoint_are_not_resolved(interpolated: Path) -> None:
    adapter = interpolated.parent / "adapter"
    adapter.mkdir()
    interpolated.rename(interpolated.parent / "config.yaml")
    with pytest.warns(UserWarning, match="left as text"):
        config, of_run = run_settings({"max_train_steps": "1"}, ROOT / "recipes" / "configs", adapter)
    assert of_run
    assert config.revision == "${oc.env:CAMEO_TEST_SECRET}"
    named = {"config": str(interpolated.parent / "config.yaml")}  # by the user, who has looked at it
    assert run_settings(named, ROOT / "recipes" / "configs", adapter)[0].revision == TOKEN


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rank: ${oc.env:CAMEO_TEST_SECRET}", r"rank: expected a whole number, got '\$\{oc.env:CAMEO_TEST_SECRET\}'"),
        ("lr_scheduler: ${oc.env:CAMEO_TEST_SECRET}", r"unknown lr_scheduler '\$\{oc.env:CAMEO_TEST_SECRET\}'"),
        ("revision: ${oc.env:CAMEO_TEST_ABSENT}", r"revision: .*CAMEO_TEST_ABSENT"),
        ("revision: ${nothing}", r"revision: .*nothing"),
    ],
)
def test_errors_show_an_interpolation_as_it_was_typed(interpolated: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(write(interpolated, line + "\n"))
    assert "topsecret" not in str(caught.value)


# 7. Recipes

RUN = """
import contextlib, io, json, runpy, sys, warnings
recipe, mistake = sys.argv[1], json.loads(sys.argv[2])
answers = []
for arguments in (["--help"], ["--print-config", "loss_weight=0.5"], mistake):
    sys.argv, out, err, status = [recipe, *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps([answers, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_answers_at_once_and_tells_a_mistake_in_one_paragraph(recipe: str) -> None:
    mistake = [f"hub_token={TOKEN}", "max_train_steps=x"]
    script = str(ROOT / "recipes" / f"{recipe}.py")
    command = [sys.executable, "-W", "ignore", "-c", RUN, script, json.dumps(mistake)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (help_, printed, wrong), modules = json.loads(done.stdout)
    assert help_[0] == printed[0] == 0
    assert "learning_rate=0.0001  (a number)" in help_[1]
    assert "Factor of the alignment loss" in help_[1]
    assert yaml.safe_load(printed[1])["loss_weight"] == 0.5
    assert wrong == [2, "", f"{recipe}.py: max_train_steps: expected a whole number, got 'x'\n"]
    assert not {"torch", "numpy", "diffusers", "omegaconf"} & set(modules)


def raising(error: Exception) -> Any:
    def main(arguments: list[str]) -> None:
        raise error

    return main


def test_a_mistake_of_the_user_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def load(arguments: list[str]) -> None:
        load_config("absent.yaml", arguments)

    with pytest.raises(SystemExit) as caught:
        run_recipe(load, lambda _: [], [TrainingConfig], about="", arguments=[])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("absent.yaml: no such settings file\n")
    worker = DataError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                       "  File ...\ncameo.errors.DataError: frame 3:\n  no depth")  # fmt: skip
    with pytest.raises(SystemExit):
        run_recipe(raising(worker), lambda _: [], [TrainingConfig], about="", arguments=[])
    assert capsys.readouterr().err.endswith(": frame 3: no depth\n")


@pytest.mark.parametrize("fault", [lambda _: int("x"), lambda _: json.loads("{"), raising(RuntimeError("broken"))])
def test_a_fault_of_the_program_keeps_its_traceback(fault: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        run_recipe(fault, lambda _: [], [TrainingConfig], about="", arguments=[])


# 8. Help


def test_every_setting_says_what_it_is() -> None:
    for kind in (TrainingConfig, EvaluationSettings):
        for component in components(kind):
            for name, comment in comments(component).items():
                assert re.match(r"[A-Z0-9].*\.$", comment), f"{component.__name__}.{name}: {comment!r}"
                assert len(comment) > 30, name


def test_help_lists_each_setting_once() -> None:
    text = help_text("About.", [Options, EvaluationSettings, TrainingConfig])
    for name in {*vars(TrainingConfig()), *vars(EvaluationSettings()), "output"}:
        assert len(re.findall(rf"^  {name}=", text, re.MULTILINE)) == 1, name
    assert "correspondence=depth  (depth, point_map, features)" in text
    assert max(map(len, text.splitlines())) <= 120


# 9. Parts that are loaded on first use


def test_import_loads_nothing_slow() -> None:
    code = "import sys, cameo, cameo.data, cameo.training.config; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("package", ["cameo", "cameo.data"])
def test_a_package_loads_what_type_checkers_see(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    loaded = ast.literal_eval(block.orelse[0].value.args[1])  # type: ignore[attr-defined]
    assert loaded == seen
    assert set(module.__all__) == set(seen)
    assert set(module.__all__) <= set(dir(module))
    for name, place in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(place)), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_wrap_stays_the_function_when_its_module_is_imported_first() -> None:
    module = importlib.import_module("cameo.wrap")
    cameo.wrap = module  # type: ignore[assignment]  # as the import system does it
    assert cameo.wrap is module.wrap


def test_names_that_settings_choose_from_are_those_of_the_code() -> None:
    from cameo.data import RIGS
    from cameo.evaluation.metrics import TRUNKS
    from cameo.training.correspondences import KINDS

    assert tuple(RIGS) == choices.RIG_NAMES
    assert tuple(TRUNKS) == choices.LPIPS_TRUNKS
    correspondence = TrainingConfig.__dataclass_fields__["correspondence"]
    assert tuple(correspondence.metadata["choices"]) == KINDS
