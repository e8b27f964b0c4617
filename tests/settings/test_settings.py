"""Settings: text stays as it was typed, and types and bounds come from the fields."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from cameo.evaluation.settings import EvaluationSettings
from cameo.settings import Settings, setting, split_arguments, to_yaml, typed_values
from cameo.settings.text import guess, parse_yaml
from cameo.training.settings import TrainingConfig, load_config, save_config


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
