"""Every old name in the tables of `cameo.renamed` works, and its warning names the new one.

A row that is added to a table needs an example here. Pickles and saved pipelines are in `test_moved.py`, adapters of
other packages in `test_renamed_methods.py`.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo import AlignmentHead, Correspondence, TokenLayout, alignment_loss, renamed
from cameo.attention.capture import AttentionLayer, CapturedAttention
from cameo.backbone import Backbone, Release, get_backbone
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.hub import push_to_hub, save_load, save_pretrained
from cameo.renamed import ATTRIBUTES, CONFIG_KEYS, FUNCTIONS, KEYWORDS, METHODS, SETTINGS
from cameo.training.settings import TrainingConfig, load_config
from tests.helpers.batches import make_batch
from tests.helpers.models import JointModel
from tests.helpers.probes import LEVELS, NOTHING_PROBED, tiny_model, uneven_probe

LINEAR = nn.Linear(1, 1)
LAYER = AttentionLayer(0, "joint", 2, TokenLayout("b (v h w)"), stride=8)
GRIDS = ((2, 2), (2, 2), (2, 2))
INDEX = torch.full((1, 3, 3, 4), -1)
INDEX[0, 0, 1] = torch.tensor([3, 1, -1, 0])
TOKENS = torch.arange(12.0).reshape(1, 1, 12, 1)


def rows(table: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, str]]:
    return [(owner, old, new) for owner, names in table.items() for old, new in names.items()]


@contextmanager
def warns_once(message: str) -> Iterator[None]:
    """Expect one `FutureWarning` with this beginning, which points at this file."""
    with pytest.warns(FutureWarning) as caught:
        yield
    (found,) = [warning for warning in caught if issubclass(warning.category, FutureWarning)]
    assert str(found.message).startswith(message)
    assert found.filename == __file__


def test_every_table_is_tested() -> None:
    tables = {name for name in renamed.__all__ if name.isupper()}
    assert tables - {"MOVED", "MOVED_NAMES"} == EXAMPLES.keys()  # each row of these two is its own example
    for name, examples in EXAMPLES.items():
        table = getattr(renamed, name)
        by_owner = all(isinstance(names, dict) for names in table.values())
        assert examples.keys() == ({(owner, old) for owner, old, _ in rows(table)} if by_owner else table.keys()), name


# Keywords


def wrapped() -> cameo.CameoModel:
    torch.manual_seed(0)
    return cameo.wrap(JointModel(), layer="joint", layout="b (v h w)")


def figures(match: Correspondence) -> tuple[Any, ...]:
    weight = None if match.match_weight is None else match.match_weight.tolist()
    return match.index.tolist(), match.token_grids, weight


def matches_of_depth(**keywords: Any) -> Correspondence:
    intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3)
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    return Correspondence.from_depth(torch.ones(1, 2, 1, 8, 8), intrinsics, extrinsics, **keywords)


def matches_of_point_maps(**keywords: Any) -> Correspondence:
    points = torch.randn(1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 2, 1, 1, 1)
    return Correspondence.from_point_maps(points, **keywords)


def matches_of_features(**keywords: Any) -> Correspondence:
    features = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return Correspondence.from_features(features, **keywords)


def loss(**keywords: Any) -> float:
    query, key = torch.randn(2, 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return float(alignment_loss(query, key, Correspondence(INDEX, GRIDS), AlignmentHead(2, "mean"), **keywords))


def card_of_save(save: Callable[..., Path], **keywords: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save(wrapped(), f"{folder}/rooms", **keywords)
        return (Path(folder) / "rooms" / "README.md").read_text()


def card_of_push(push: Callable[..., str], **keywords: Any) -> str:
    def read(stage: Path, repo_id: str, **options: Any) -> str:
        return (stage / "README.md").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_load, "upload", read)
        patch.setattr(save_load, "check_access", lambda repo_id, token: repo_id)
        return push(wrapped(), "me/rooms", token="hf_of_nobody", **keywords)


def split(**keywords: Any) -> tuple[Tensor, Tensor, Correspondence]:
    tokens = torch.zeros(1, 2, 12, 4)
    return cameo.CameoModel.split(
        seen=CapturedAttention(tokens, tokens, 0.5), match=Correspondence(INDEX, GRIDS), **keywords
    )


@dataclass(frozen=True)
class Keyword:
    """A call that takes the keyword under both names, another value than the default, and what is compared."""

    call: Callable[..., Any]
    value: Any
    shows: Callable[[Any], Any] = lambda result: result


KEYWORD_EXAMPLES: dict[tuple[str, str], Keyword] = {
    ("CameoConfig", "normalise"): Keyword(lambda **given: CameoConfig("cat3d", ["mid"], **given), "all_views"),
    ("CameoModel.capture", "sites"): Keyword(
        lambda **given: wrapped().capture(**given), [LAYER], lambda capture: list(capture._attention_layers)
    ),
    ("CameoModel.push_to_hub", "licence"): Keyword(
        lambda **given: card_of_push(cameo.CameoModel.push_to_hub, **given), "cc-by-4.0"
    ),
    ("CameoModel.split", "site"): Keyword(split, LAYER, lambda parts: [part.shape for part in parts[:2]]),
    ("CameoModel.save_pretrained", "licence"): Keyword(
        lambda **given: card_of_save(cameo.CameoModel.save_pretrained, **given), "cc-by-4.0"
    ),
    ("Correspondence", "sizes"): Keyword(lambda **given: Correspondence(INDEX, **given), GRIDS, figures),
    ("Correspondence", "weight"): Keyword(
        lambda **given: Correspondence(INDEX, GRIDS, **given), torch.full(INDEX.shape, 0.5), figures
    ),
    ("Correspondence.from_depth", "size"): Keyword(lambda **given: matches_of_depth(**given), 4, figures),
    ("Correspondence.from_features", "size"): Keyword(lambda **given: matches_of_features(**given), 2, figures),
    ("Correspondence.from_point_maps", "size"): Keyword(lambda **given: matches_of_point_maps(**given), 4, figures),
    ("LayerProbe", "timesteps"): Keyword(lambda **given: cameo.LayerProbe((), **NOTHING_PROBED, **given), LEVELS, vars),
    ("ProbeResult.chance", "timestep"): Keyword(lambda **given: uneven_probe().chance(0, **given), 1.0),
    ("ProbeResult.per_scene", "timestep"): Keyword(lambda **given: uneven_probe().per_scene(0, **given), 1.0),
    ("ProbeResult.precision", "timestep"): Keyword(lambda **given: uneven_probe().precision(0, **given), 1.0),
    ("ProbeResult.skill", "timestep"): Keyword(lambda **given: uneven_probe().skill(0, **given), 1.0),
    ("TokenLayout.refusal", "normalise"): Keyword(
        lambda **given: TokenLayout("(b h w) v").refusal(**given), "per_view"
    ),
    ("TokenLayout.locate", "sizes"): Keyword(
        lambda **given: TokenLayout("b (v h w)").locate(2, 1, 0, batch_index=0, batch=1, **given), GRIDS
    ),
    ("TokenLayout.shape", "sizes"): Keyword(
        lambda **given: TokenLayout("b (v h w)").shape("key", batch=1, **given), GRIDS
    ),
    ("TokenLayout.split_key", "sizes"): Keyword(
        lambda **given: TokenLayout("b (v h w)").split_key(TOKENS, batch=1, **given), GRIDS, Tensor.tolist
    ),
    ("TokenLayout.split_query", "sizes"): Keyword(
        lambda **given: TokenLayout("b (v h w)").split_query(TOKENS, batch=1, **given), GRIDS, Tensor.tolist
    ),
    ("alignment_loss", "normalise"): Keyword(loss, "all_views"),
    ("probe_layers", "timesteps"): Keyword(
        lambda **given: cameo.probe_layers(*tiny_model(), **given).to_dict(), (0.5,)
    ),
    ("push_to_hub", "licence"): Keyword(lambda **given: card_of_push(push_to_hub, **given), "cc-by-4.0"),
    ("save_pretrained", "licence"): Keyword(lambda **given: card_of_save(save_pretrained, **given), "cc-by-4.0"),
    ("wrap", "normalise"): Keyword(
        lambda **given: cameo.wrap(JointModel(), layer="joint", layout="b (v h w)", **given),
        "all_views",
        lambda model: model.cameo_config,
    ),
}


@pytest.mark.parametrize(("owner", "old", "new"), rows(KEYWORDS))
def test_an_old_keyword_does_what_the_new_one_does(owner: str, old: str, new: str) -> None:
    example = KEYWORD_EXAMPLES[owner, old]
    with warnings.catch_warnings(action="error"):
        expected = example.shows(example.call(**{new: example.value}))
    with warns_once(f"{owner}({old}=) is now called {new}=; "):
        found = example.shows(example.call(**{old: example.value}))
    assert found == expected


@pytest.mark.parametrize(("owner", "old", "new"), rows(KEYWORDS))
def test_a_keyword_under_both_names_is_refused(owner: str, old: str, new: str) -> None:
    example = KEYWORD_EXAMPLES[owner, old]
    message = re.escape(f"{owner}: got {old}= and {new}=, which are one argument; give {new}= alone")
    with pytest.raises(TypeError, match=message):
        example.call(**{old: example.value, new: example.value})


@pytest.mark.parametrize("old", ["sizes", "weight"])
def test_replace_takes_an_old_keyword(old: str) -> None:
    match = Correspondence(INDEX, GRIDS, match_weight=torch.ones(INDEX.shape))
    with pytest.warns(FutureWarning, match=rf"Correspondence\({old}=\) is now called"):
        changed = replace(match, **{old: KEYWORD_EXAMPLES["Correspondence", old].value})
    assert figures(changed)[2][0][0][0] == ([0.5] * 4 if old == "weight" else [1.0] * 4)


# Functions


# A call of the function, which is handed over, and what it returns.
FUNCTION_EXAMPLES: dict[tuple[str, str], Callable[[Callable[..., Any]], bool]] = {
    ("cameo.backbone", "core_module"): lambda function: function(LINEAR) is LINEAR,
    ("cameo.data.matches", "Sizes"): lambda alias: alias == tuple[tuple[int, int], ...],
    ("cameo.evaluation.validation", "covisible_pixels"): lambda function: function(make_batch()).dtype == torch.bool,
    **{("cameo.evaluation.validation", f): callable for f in ("denoising_passes", "fixed_inputs", "sample_batches")},
    ("cameo.model", "holder"): lambda function: function(LINEAR) is None,
    ("cameo.training.data", "to_device"): lambda function: function({"seed": 1}, torch.device("cpu")) == {"seed": 1},
    ("cameo.training.setup", "arms_of"): lambda function: list(function(TrainingConfig())) == ["with CAMEO"],
}


@pytest.mark.parametrize(("module", "old", "new"), rows(FUNCTIONS))
def test_an_old_function_is_the_new_one(module: str, old: str, new: str) -> None:
    place = importlib.import_module(module)
    with warns_once(f"{module}.{old} is now called {new}; "):
        function = getattr(place, old)
    elsewhere, _, current = new.rpartition(".")
    assert function is getattr(importlib.import_module(elsewhere or module), current)
    assert FUNCTION_EXAMPLES[module, old](function)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = place.nothing  # type: ignore[attr-defined]


# Attributes


@dataclass(frozen=True)
class Attribute:
    """An object with the attribute, and a value that it takes where it can be set."""

    make: Callable[[], Any]
    value: Any = None


def correspondence() -> Correspondence:
    return Correspondence(INDEX, GRIDS, match_weight=torch.full(INDEX.shape, 0.5))


ATTRIBUTE_EXAMPLES: dict[tuple[str, str], Attribute] = {
    ("AttentionLayer", "sizes"): Attribute(lambda: LAYER),
    ("CameoConfig", "normalise"): Attribute(lambda: CameoConfig("cat3d", ["mid"]), "all_views"),
    ("CameoModel", "sites"): Attribute(wrapped),
    ("CameoModel", "supervised_sites"): Attribute(wrapped),
    ("Correspondence", "sizes"): Attribute(correspondence),
    ("Correspondence", "visible"): Attribute(correspondence),
    ("Correspondence", "weight"): Attribute(correspondence),
    ("LayerProbe", "timesteps"): Attribute(uneven_probe),
    ("Release", "licence"): Attribute(lambda: Release("openrail++")),
    ("TokenLayout", "localise"): Attribute(lambda: TokenLayout("b (v h w)")),
}


@pytest.mark.parametrize(("owner", "old", "new"), rows(ATTRIBUTES))
def test_an_old_attribute_is_the_new_one(owner: str, old: str, new: str) -> None:
    example = ATTRIBUTE_EXAMPLES[owner, old]
    thing = example.make()
    with warns_once(f"{owner}.{old} is now called {new}; "):
        found = getattr(thing, old)
    expected = getattr(thing, new)
    assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
    if example.value is not None:
        with warns_once(f"{owner}.{old} is now called {new}; "):
            setattr(thing, old, example.value)
        assert getattr(thing, new) == example.value != expected
    elif not callable(expected):
        for name in (old, new):
            with pytest.raises(AttributeError), warnings.catch_warnings(action="ignore"):
                setattr(thing, name, expected)


# Methods of adapters


# What a method that overrides the old name returns, and the argument it is asked with.
METHOD_EXAMPLES: dict[str, tuple[Any, Any]] = {
    "hazard": ("it is recomputed", LINEAR),
    "inflatable": ([], LINEAR),
    "licence": ("mit", "me/model"),
    "recognises": (True, LINEAR),
    "sites": ([], LINEAR),
}


@pytest.mark.parametrize(("old", "new"), METHODS.items())
def test_an_override_under_an_old_name_is_that_of_the_new_one(old: str, new: str) -> None:
    value, argument = METHOD_EXAMPLES[old]
    with warns_once(f"Adapter.{old} is now called {new}; "):

        class Adapter(Backbone):
            vars()[old] = lambda self, asked: (value, asked)
            __qualname__ = "Adapter"

    with warnings.catch_warnings(action="error"):
        assert getattr(Adapter(), new)(argument) == (value, argument)


@pytest.mark.parametrize("name", ["cat3d", "mvdream", "sv3d", "zero123plus"])
@pytest.mark.parametrize(("old", "new"), METHODS.items())
def test_an_old_method_can_be_called(old: str, new: str, name: str) -> None:
    adapter, argument = get_backbone(name), METHOD_EXAMPLES[old][1]
    expected = getattr(adapter, new)(argument)
    with warns_once(f"Backbone.{old} is now called {new}; "):
        assert getattr(adapter, old)(argument) == expected


# Settings of a run


SETTING_EXAMPLES: dict[str, Any] = {"hub_licence": "openrail", "normalise": "all_views", "weight": 0.5}
WAYS: dict[str, tuple[str, Callable[[Path, str, Any], TrainingConfig]]] = {
    "file": ("the setting {}", lambda path, name, value: load_config(written(path, f"{name}: {value}\n"))),
    "command line": ("the setting {}", lambda path, name, value: load_config(path, [f"{name}={value}"])),
    "keyword": ("TrainingConfig({}=)", lambda path, name, value: TrainingConfig(**{name: value})),
    "replace": ("TrainingConfig({}=)", lambda path, name, value: replace(TrainingConfig(), **{name: value})),
}


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_an_old_setting_is_the_new_one(old: str, new: str, way: str, tmp_path: Path) -> None:
    path, value = written(tmp_path / "run.yaml", ""), SETTING_EXAMPLES[old]
    named, load = WAYS[way]
    with pytest.warns(FutureWarning, match=re.escape(f"{named.format(old)} is now called {new}")) as warned:
        config = load(path, old, value)
    assert len(warned) == 1
    assert config == load(path, new, value)
    assert getattr(config, new) == value != getattr(TrainingConfig(), new)


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
def test_an_old_setting_is_read_and_written_as_an_attribute(old: str, new: str) -> None:
    config = TrainingConfig()
    with warns_once(f"the setting {old} is now called {new}; "):
        assert getattr(config, old) == getattr(config, new)
    with warns_once(f"the setting {old} is now called {new}; "):
        setattr(config, old, SETTING_EXAMPLES[old])
    assert getattr(config, new) == SETTING_EXAMPLES[old]
    assert old not in vars(config)


@pytest.mark.parametrize(("old", "new"), SETTINGS.items())
@pytest.mark.filterwarnings("ignore:.* is now called:FutureWarning")
def test_a_setting_under_both_names_is_refused(old: str, new: str, tmp_path: Path) -> None:
    value = SETTING_EXAMPLES[old]
    path = written(tmp_path / "run.yaml", f"{old}: {value}\n{new}: {value}\n")
    message = f"{old}: is the old name of {new}, and both are given; leave out {old}"
    with pytest.raises(ValueError, match=message):
        load_config(path)
    with pytest.raises(TypeError, match=f"got {old}= and {new}=, which are one argument"):
        TrainingConfig(**{old: value, new: value})


# Keys of cameo_config.json


CONFIG_EXAMPLES: dict[str, Any] = {"normalise": "all_views"}


@pytest.mark.parametrize(("old", "new"), CONFIG_KEYS.items())
def test_an_old_key_of_a_saved_file_is_read_without_a_warning(old: str, new: str, tmp_path: Path) -> None:
    values = {"backbone": "cat3d", "layers": ["mid"], old: CONFIG_EXAMPLES[old]}
    path = written(tmp_path / CONFIG_NAME, json.dumps(values))
    with warnings.catch_warnings(action="error"):
        config = CameoConfig.load(tmp_path)
    assert getattr(config, new) == CONFIG_EXAMPLES[old] != getattr(CameoConfig("cat3d", ["mid"]), new)
    assert new in json.loads(config.save(tmp_path / "again").read_text())
    written(path, json.dumps({**values, new: CONFIG_EXAMPLES[old]}))
    with pytest.raises(DataError, match=f"holds {old} and {new}, which are one setting; remove the first"):
        CameoConfig.load(tmp_path)


EXAMPLES: dict[str, Mapping[Any, Any]] = {
    "ATTRIBUTES": ATTRIBUTE_EXAMPLES,
    "CONFIG_KEYS": CONFIG_EXAMPLES,
    "FUNCTIONS": FUNCTION_EXAMPLES,
    "KEYWORDS": KEYWORD_EXAMPLES,
    "METHODS": METHOD_EXAMPLES,
    "SETTINGS": SETTING_EXAMPLES,
}
