"""The command `cameo`: what it says of itself, of the installation, and of a run that it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cameo.commands import doctor
from cameo.commands.main import COMMANDS, main
from cameo.recipes.explore import Options, checkpoints_of
from cameo.version import __version__
from tests.helpers.training_runs import fresh_accelerate, make_trainer, scene_cache


def test_every_command_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in listed
        assert command.about in listed
        main([name, "--help"])
        assert f"cameo {name}" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["explor"])
    assert "did you mean 'explore'?" in capsys.readouterr().err


def test_help_needs_the_standard_library_alone() -> None:
    code = "import sys; from cameo.commands.main import main; main(['--help']); print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for package in ("torch", "numpy", "yaml", "diffusers"):
        assert f"'{package}'" not in shown


def test_doctor_finds_the_other_package_of_that_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda: ["torch", "cameo-diffusion"])
    main(["doctor"])
    shown = capsys.readouterr().out
    assert f"cameo {__version__}" in shown
    assert "none found" in shown
    assert "flash_attn_func" in shown
    monkeypatch.setattr(doctor, "installed", lambda: ["Cameo", "cameo-diffusion"])
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert "pip uninstall cameo" in capsys.readouterr().out


def test_doctor_fails_where_a_package_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"diffusers": None, "peft": "0.1"}
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else version(name))
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    shown = capsys.readouterr().out
    assert re.search(r"diffusers is missing, expected \S*>=0\.\d+", shown)
    assert re.search(r"peft 0\.1, expected >=0\.\d+", shown)
    assert re.search(
        r'missing or of another version: diffusers\S+, peft\S+\. Cure: pip install "diffusers\S+" "peft', shown
    )


def test_doctor_fails_where_the_library_itself_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "not-installed")
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])
    assert "not-installed is not installed, so no backbone is registered" in capsys.readouterr().out


def test_a_run_and_its_base_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        trainer = make_trainer(tmp_path / "run", max_train_steps=1, head="mlp")
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "run" / "adapter", include_head=True)
    page = tmp_path / "page.html"
    main(["explore", str(tmp_path / "run"), f"output={page}", "noise_levels=[1.0]", "num_scenes_shown=1", "layers=all"])
    assert str(page) in capsys.readouterr().out
    text = page.read_text("utf-8")
    assert '"models":["base","with CAMEO"]' in text
    assert "through the alignment head" in text
    layers = trainer.model.attention_layers
    assert len(layers) > 1
    for layer in layers:
        assert f"{layer.index}: {layer.path}" in text


def test_what_a_name_stands_for(tmp_path: Path) -> None:
    for folder in ("adapter", "without_cameo/adapter"):
        (tmp_path / folder).mkdir(parents=True)
    assert checkpoints_of(str(tmp_path)) == [str(tmp_path / "without_cameo/adapter"), str(tmp_path / "adapter")]
    assert checkpoints_of("you/rooms-lora") == ["you/rooms-lora"]
    with pytest.raises(ValueError, match="expected one or two folders or Hub ids, got 0"):
        Options()
    with pytest.raises(ValueError, match="noise_levels"):
        Options(models=["one"], noise_levels=[1.5])


def test_a_model_that_is_not_there_is_a_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["explore", "no/such/folder/anywhere"])
    message = capsys.readouterr().err
    assert "no/such/folder/anywhere" in message
    assert "Traceback" not in message
