from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import cameo

PUBLIC = [
    "AlignmentHead",
    "CameoModel",
    "Correspondence",
    "LayerProbe",
    "TokenLayout",
    "Tracks",
    "alignment_loss",
    "backbones",
    "from_pretrained",
    "probe_layers",
    "register_backbone",
    "wrap",
]
HEAVY = [
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "omegaconf",
    "peft",
    "safetensors",
    "scipy",
    "timm",
    "torchvision",
    "transformers",
    "trimesh",
    "xformers",
]


def test_the_public_names_are_frozen() -> None:
    assert sorted(cameo.__all__) == PUBLIC
    assert cameo.__version__


def test_everything_public_is_where_all_says() -> None:
    for name in PUBLIC:
        assert hasattr(cameo, name), name
    assert set(PUBLIC) <= set(dir(cameo))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(cameo, name)) or ""
    first = text.split("\n")[0]
    assert first.endswith((".", ":")), f"{name}: the first line is no sentence: {first!r}"
    assert ">>> " in text, f"{name} has no example"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_of_a_public_name_is_documented(name: str) -> None:
    thing = getattr(cameo, name)
    text = inspect.getdoc(thing) or ""
    options = [
        parameter.name
        for parameter in inspect.signature(thing).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    missing = [option for option in options if option not in text]
    assert not missing, f"{name}: undocumented {missing}"


def test_import_is_light() -> None:
    code = f"import sys, cameo; cameo.backbones(); print([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_adapters_are_installed_inside_the_package() -> None:
    import cameo.adapters

    assert cameo.adapters.__name__ == "cameo.adapters"
