"""Settings of a run: what is accepted, what is refused and how, and what never leaves the process."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from cameo.data.settings import room_rig
from cameo.errors import DataError
from cameo.settings import comparable
from cameo.training.checkpoints.folder import check_continues
from cameo.training.settings import TrainingConfig, continued_settings, load_config, save_config, settings_file
from cameo.training.settings.config import CHANGEABLE

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny\nmax_train_steps: 10\npreset_options:\n  heads: 2\n")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_load(path: Path) -> None:
    config = load_config(path)
    given = yaml.safe_load(path.read_text())
    assert given
    for name, value in given.items():
        assert comparable(getattr(config, name)) == value


def test_a_rig_in_rooms_gives_way_with_its_settings(file: Path, tmp_path: Path) -> None:
    rig = {"camera_rig": "fan", "rig_azimuths": [0, 5, 10], "rig_distance": [1, 2], "data_format": "bare_rooms"}
    file.write_text(yaml.safe_dump(rig))
    assert load_config(file, ["rig_azimuths=[0,1,2]"]).rig_distance == (1.0, 2.0)
    assert load_config(file, ["camera_rig=fan"]).rig_azimuths == [0, 5, 10]
    for other in ("camera_rig=imagedream", f"train_data_dir={tmp_path}"):
        config = load_config(file, [other])
        assert (config.rig_azimuths, config.rig_distance) == (None, TrainingConfig.rig_distance)
        assert config.data_format == "auto"
    with pytest.raises(ValueError, match="rig_jitter"):
        load_config(file, ["camera_rig=imagedream", "rig_jitter=[1,1]"])


@pytest.mark.parametrize("recipe", ["lora", "full"])
def test_each_backbone_has_settings_of_its_own(recipe: str) -> None:
    for backbone in ("cat3d", "mvdream", "sv3d", "zero123plus"):
        path = settings_file(recipe, CONFIGS, ["seed=1", f"--backbone={backbone}"])
        assert load_config(path).backbone == backbone
    assert settings_file(recipe, CONFIGS, []).name == f"{recipe}_cat3d_tiny.yaml"


def test_a_backbone_without_settings() -> None:
    message = r"unknown backbone with settings of its own 'mvdreem': did you mean 'mvdream'\?.*config=your.yaml"
    with pytest.raises(ValueError, match=message):
        settings_file("lora", CONFIGS, ["backbone=mvdreem"])
    settings_file("lora", CONFIGS, ["backbone=mine", "config=mine.yaml"])  # need not exist: config= replaces it


def test_overrides_win_and_keep_their_types(file: Path) -> None:
    overrides = ["--learning_rate=1e-3", "use_ema=true", "layer=[1, 2]", "preset_options.heads=4", "revision=null"]
    config = load_config(file, [*overrides, "target_modules=[to_q]", "hub_private=false", "head={kind: mlp, depth: 2}"])
    assert config.learning_rate == 0.001
    assert config.use_ema is True
    assert config.layer == [1, 2]
    assert config.preset_options == {"heads": 4}
    assert config.revision is None
    assert config.target_modules == ["to_q"]
    assert config.hub_private is False
    assert config.head == {"kind": "mlp", "depth": 2}
    assert config.max_train_steps == 10


def test_config_is_found_by_the_name_of_a_shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = settings_file("lora", CONFIGS, ["config=lora_cat3d_sd21"])
    named = load_config(default, ["config=lora_cat3d_sd21", "max_train_steps=3"])
    assert named == load_config(CONFIGS / "lora_cat3d_sd21.yaml", ["max_train_steps=3"])
    with pytest.raises(ValueError, match="unknown config 'lora_cat3d_sd2': did you mean 'lora_cat3d_sd21'"):
        load_config(default, ["config=lora_cat3d_sd2"])
    monkeypatch.chdir(tmp_path)
    Path("lora_cat3d_sd21").write_text("num_views: 5\n")  # a file of the user comes first
    assert load_config(default, ["config=lora_cat3d_sd21"]).num_views == 5


def test_config_override_replaces_the_file(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("rank: 8\n")
    config = load_config(file, ["rank=2", f"config={other}", "seed=3"])
    assert (config.rank, config.seed, config.max_train_steps) == (2, 3, TrainingConfig().max_train_steps)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", r"unknown setting 'learning_rat': did you mean 'learning_rate'\?"),
        ("learning_rate", r"argument 'learning_rate': expected key=value"),
        ("rank=four", r"^rank: expected a whole number, got 'four'$"),
        ("rank=", r"^rank: expected a whole number, got null$"),
        ("use_ema=maybe", r"use_ema: expected true or false, got 'maybe'"),
        ("mixed_precision=fp61", r"unknown mixed_precision 'fp61': did you mean 'fp16'"),
        ("lr_scheduler=cosin", r"unknown lr_scheduler 'cosin': did you mean 'cosine'"),
        ("data_format=tum", r"unknown data_format 'tum': .*rgbd"),
        ("correspondence=dept", r"unknown correspondence 'dept': did you mean 'depth'"),
        ("correspondence_in=loader", r"unknown correspondence_in 'loader': .*Known: step, worker"),
        ("checkpointing_steps=0", r"checkpointing_steps: expected at least 1, got 0"),
        ("checkpoints_total_limit=0", r"checkpoints_total_limit: expected at least 1, got 0"),
        ("validation_steps=0", r"validation_steps: expected at least 1"),
        ("num_validation_images=-1", r"num_validation_images: expected at least 0"),
        ("num_views=1", r"num_views: expected at least 2, got 1"),
        ("num_reference_views=3", r"num_reference_views=3: expected fewer than num_views=3"),
        ("seed=-1", r"seed: expected at least 0, got -1"),
        ("learning_rate=-1", r"learning_rate: expected at least 0"),
        ("learning_rate=nan", r"learning_rate: expected a finite number, got nan"),
        ("max_grad_norm=0", r"max_grad_norm: expected a number > 0"),
        ("lora_dropout=1", r"lora_dropout: expected a share in \[0, 1\)"),
        ("loss_weight=-0.1", r"loss_weight: expected at least 0, got -0.1"),
        ("lr_warmup_steps=5", r"lr_warmup_steps has no effect .*constant_with_warmup"),
        ("pretrained_model_name_or_path=x", r"pretrained_model_name_or_path and preset: give one"),
        ("push_to_hub=true", r"push_to_hub=true needs hub_model_id=your-name/your-model"),
        ("layer=[", r"layer: not valid YAML"),
        ("camera_rig=zero123", r"unknown camera_rig 'zero123': did you mean 'zero123plus-v1.2'"),
        ("num_reference_views=-1", r"num_reference_views: expected at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["camera_rig=mvdream", "data_format=scenes"], r"camera_rig=mvdream: .*needs data_format=.*got scenes"),
        (["camera_rig=mvdream", "data_format=bare_rooms"], r"camera_rig=mvdream: .*got bare_rooms"),
        (["camera_rig=mvdream", "data_format=rgbd"], r"camera_rig=mvdream: .*needs data_format=.*got rgbd"),
        (
            ["data_format=objects", "train_data_dir=office"],
            r"data_format=objects .*train_data_dir=office .*not be read",
        ),
        (["data_format=scenes", "train_data_dir=office"], r"data_format=scenes .*train_data_dir=office .*not be read"),
    ],
)
def test_data_settings_that_contradict_each_other(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rig_azimuths=0,-24", "num_views=3"], r"num_views=3: rig_azimuths: expected one per view, 3, got 2"),
        (["rig_elevations=5,0,0"], r"rig_elevations: expected angles relative to view 0, .* got 5.0"),
        (["rig_distance=2,1"], r"rig_distance: expected meters .* got \[2.0, 1.0\]"),
        (["rig_jitter=3"], r"rig_jitter: expected a list \[a, b\], got '3'"),
        (["rig_separation=180"], r"rig_separation: expected degrees in \[0, 180\)"),
        (["data_format=objects"], r"camera_rig=fan: stands in an embedded room, .* got objects"),
        (["train_data_dir=office"], r"camera_rig=fan: stands in an embedded room, .* got train_data_dir=office"),
        (["camera_rig=null", "rig_jitter=3,1"], r"rig_jitter=\(3.0, 1.0\): is of the rig fan, got camera_rig=None"),
    ],
)
def test_settings_of_a_rig_in_rooms_that_make_none(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(file, ["camera_rig=fan", *overrides])


def test_a_rig_in_rooms_leaves_the_rooms_of_a_settings_file(file: Path) -> None:
    file.write_text("data_format: bare_rooms\nrig_azimuths: [0, -16, 16]\ncamera_rig: fan\n")
    assert load_config(file, ["camera_rig=fan"]).data_format == "bare_rooms"
    rig = room_rig(load_config(file, ["rig_distance=1,2", "min_overlap=0.4"]))
    assert rig is not None
    assert (rig.azimuths, rig.distance, rig.overlap) == ((0, -16, 16), (1, 2), (0.4, 0.9))
    assert room_rig(TrainingConfig()) is None


def test_a_settings_file_of_another_backbone_gives_way_to_the_override() -> None:
    given = [f"config={CONFIGS / 'lora_sv3d_tiny.yaml'}", "backbone=mvdream"]
    config = load_config(settings_file("lora", CONFIGS, given), given)
    assert (config.backbone, config.rig_jitter) == ("mvdream", (50, 10))  # only what is named is replaced


@pytest.mark.parametrize("data", ["train_data_dir=rooms", "camera_rig=sv3d-orbit"])
def test_embedded_data_of_a_settings_file_gives_way_to_data_that_is_named(file: Path, data: str) -> None:
    file.write_text("data_format: bare_rooms\n")
    assert load_config(file, [data]).data_format == "auto"
    assert load_config(file, ["seed=1"]).data_format == "bare_rooms"
    assert load_config(file, [data, "data_format=meshes"]).data_format == "meshes"
    with pytest.raises(ValueError, match=r"data_format=(auto|objects)"):
        load_config(file, [data, "data_format=scenes"])


def test_embedded_objects_stand_on_a_rig_that_is_named(file: Path) -> None:
    file.write_text("data_format: objects\n")
    assert load_config(file, ["camera_rig=sv3d-orbit"]).data_format == "objects"
    assert load_config(file, ["train_data_dir=meshes"]).data_format == "auto"
    assert load_config(file, ["train_data_dir=null"]).data_format == "objects"


def test_a_checkpoint_of_before_a_setting_existed_continues_with_its_default(tmp_path: Path) -> None:
    settings = continued_settings(TrainingConfig())
    older = {name: value for name, value in settings.items() if name not in ("inflate", "camera_rig")}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3, "settings": older}))
    assert check_continues(tmp_path, settings, 10) == 3
    with pytest.raises(ValueError, match=r"other settings \(inflate: False -> True\)"):
        check_continues(tmp_path, {**settings, "inflate": True}, 10)


def test_one_way_to_supervise_within_a_view(file: Path) -> None:
    assert load_config(file, ["own_view=true"]).own_view is True
    with pytest.raises(ValueError, match=r"own_view=true supervises the layer as it attends, .*give one of them"):
        load_config(file, ["own_view=true", "inflate=true"])


def test_comparison_without_weight_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="compare_without_cameo=true needs loss_weight > 0"):
        load_config(file, ["compare_without_cameo=true", "loss_weight=0"])


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.yaml: no such settings file"):
        load_config(tmp_path / "absent.yaml")
    for content, message in (("a: [", "not valid YAML"), ("- 1\n- 2\n", "expected lines of `key: value`")):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(DataError, match=rf"bad.yaml.*: {message}"):
            load_config(path)


def test_saved_settings_load_again_without_the_token(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["hub_token=hf_secret", "layer=mid_block.attentions.0", "loss_weight=0"])
    save_config(config, tmp_path / "saved.yaml")
    assert "hf_secret" not in (tmp_path / "saved.yaml").read_text()
    again = load_config(tmp_path / "saved.yaml")
    config.hub_token = None
    assert again == config


def test_a_resumed_run_may_change_only_what_does_not_change_the_training() -> None:
    config = TrainingConfig(hub_token="hf_secret")
    kept = continued_settings(config)
    known = {entry.name for entry in fields(TrainingConfig)}
    assert known >= CHANGEABLE
    assert kept.keys() == known - CHANGEABLE
    assert {"seed", "train_batch_size", "learning_rate", "loss_weight", "rank", "num_views", "layer"} <= kept.keys()
    assert "hf_secret" not in str(kept)
