"""Random bad input at the public doors: is each refused clearly, or does it have a defined value?

    python -m benchmarks.reliability.bad_input --inputs 800 --seed 0

Every input is spoiled in one place, by a value or by damaged bytes, which hypothesis draws. The table is written into
`benchmarks/reliability/README.md`. The outcomes are

- `clear error`: raised by cameo on purpose, with a message that names the argument or the file;
- `defined value`: accepted, and the result is what it should be: finite, within its range, or that of the whole file;
- `not detectable`: another valid value within the weights of a saved model, or in numbers or pixels of posed images,
  whose formats hold no checksums;
- `library error`: raised by another library, or by an expression of cameo's;
- `silent wrong`: accepted, and the result is none of these;
- `hang`: longer than a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import cameo
from benchmarks.common.measuring import place_and_date
from benchmarks.common.page import fill
from cameo.backbone import get_backbone
from cameo.data import Views, open_views
from cameo.data.matches import MatchReader, MatchWriter
from cameo.data.shards import finish_share, is_finished
from cameo.errors import DataError
from cameo.tables import markdown_table
from cameo.training.settings import TrainingConfig, load_config
from tests.helpers.posed_formats import CALIBRATION, WRITERS, room_views

SECONDS = 60
OUTCOMES = ("clear error", "defined value", "not detectable", "library error", "silent wrong", "hang")
NARROW: dict[str, Any] = {"block_out_channels": (8, 8), "heads": 2, "norm_num_groups": 4}
HOSTILE: list[Any] = [
    math.nan, math.inf, -math.inf, 0, -1, 1, 2, 0.5, -0.5, 10**9, 10**30, 1e300, -1e300, 1e-300, True, None, "", "a",
    "\0", "../x", "/etc/passwd", [], [None], [[]], {}, {"a": 1}, {"kind": []}, "null", "${oc.env:HOME}", [1] * 10000,
    "x" * 10000,
]  # fmt: skip
NUMBERS = [value for value in HOSTILE if isinstance(value, int | float) and abs(value) != 10**30]
PAGE = Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Case:
    """One bad input: a group, what was spoiled and how, and what became of it."""

    group: str
    what: str
    outcome: str
    said: str


class SilentWrongError(Exception):
    """A result that no documentation promises."""


class NotDetectableError(Exception):
    """A result that differs, where the format of the file cannot show it."""


def require(holds: object, what: str) -> None:
    """Raise `SilentWrongError` unless a promise holds."""
    if not holds:
        raise SilentWrongError(what)


def outcome_of(act: Callable[[], Any]) -> tuple[str, str]:
    """Run one input; returns the outcome and the message."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(action="ignore"):
            act()
    except TimeoutError:
        return "hang", ""
    except SilentWrongError as error:
        return "silent wrong", str(error)
    except NotDetectableError as error:
        return "not detectable", str(error)
    except Exception as error:  # whatever a library trips over is what is counted here
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = (last.line or "").lstrip()
        is_own = "cameo" in Path(last.filename).parts or "adapters" in Path(last.filename).parts
        on_purpose = isinstance(error, DataError) or (is_own and line.startswith("raise"))
        kind = "clear error" if on_purpose else "library error"
        return kind, f"{type(error).__name__}: {str(error)[:160]}"
    finally:
        signal.alarm(0)
    return "defined value", ""


def geometry(drawn: st.DataObject, _: Path) -> tuple[str, Callable[[], Any]]:
    """A value of a camera or of the depth, a token grid, or a field of a correspondence."""
    depth = torch.full((1, 2, 1, 16, 16), 2.0, dtype=torch.float64)
    intrinsics = torch.tensor([[16.0, 0, 8], [0, 16, 8], [0, 0, 1]], dtype=torch.float64).repeat(1, 2, 1, 1)
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = 0.2
    grid: Any = 4
    value = drawn.draw(st.sampled_from(NUMBERS) | st.floats() | st.integers(-(10**9), 10**9))
    place = drawn.draw(st.sampled_from(["depth", "intrinsics", "extrinsics", "token_grid", "field"]))
    name = drawn.draw(st.sampled_from(["match_weight", "distance"]))
    what = f"{place} {value!r}"
    if place == "depth":
        depth[0, 1] = value
    elif place == "token_grid":
        grid = drawn.draw(st.sampled_from([value, (value, 4), (4,), "4", None]))
        what = f"token_grid {grid!r}"
    elif place != "field":
        matrix = intrinsics if place == "intrinsics" else extrinsics
        row = drawn.draw(st.integers(0, matrix.shape[-2] - 1))
        column = drawn.draw(st.integers(0, matrix.shape[-1] - 1))
        before = matrix[0, 1, row, column].item()
        matrix[0, 1, row, column] = value
        what = f"{place}[{row},{column}] {value!r}"

    def match() -> None:
        found = cameo.Correspondence.from_depth(depth, intrinsics, extrinsics, token_grid=grid)
        require(
            (found.index.ge(-1).all() and found.index.lt(16).all()) or place == "token_grid", "index outside the grid"
        )
        if place in ("intrinsics", "extrinsics") and row == len(matrix[0, 1]) - 1:
            require(abs(value - before) <= 1e-3, "a last row that is none")  # which is rounding, as documented
        if place == "depth" and not (math.isfinite(value) and value > 0):
            require(not found.matched[:, 1].any(), "missing depth has matches")

    def field() -> None:
        index = torch.zeros(1, 2, 2, 16, dtype=torch.int64)
        index[:, [0, 1], [0, 1]] = -1
        values = torch.full((1, 2, 2, 16), float(value), dtype=torch.float64)
        cameo.Correspondence(index, ((4, 4), (4, 4)), **{name: values})
        require(value >= 0 and (name == "distance" or math.isfinite(value)), f"{name} of {value}")

    return what, field if place == "field" else match


def _model(kind: str, unet: Any) -> cameo.CameoModel:
    settings = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    if kind == "LoRA":
        unet.add_adapter(settings)
    return cameo.wrap(get_peft_model(unet, settings) if kind == "PEFT" else unet, backbone="cat3d")


def damaged(path: Path, drawn: st.DataObject, first: int | None = None) -> tuple[str, int]:
    """Cut a file or change one bit, within its first so many bytes; returns what was done, and the place."""
    whole = path.read_bytes()
    at = drawn.draw(st.integers(0, (first or len(whole)) - 1))
    if drawn.draw(st.booleans()):
        path.write_bytes(whole[:at])
        return f"cut at {at} of {len(whole)}", at
    changed = bytearray(whole)
    changed[at] ^= 1 << drawn.draw(st.integers(0, 7))
    path.write_bytes(changed)
    return f"bit of byte {at} of {len(whole)}", at


def denoiser() -> Any:
    """The small base of all saved models here."""
    torch.manual_seed(0)
    return get_backbone("cat3d").build("tiny", **NARROW).unet


def saved(drawn: st.DataObject, folder: Path) -> tuple[str, Callable[[], Any]]:
    """A saved adapter or model, with a setting changed or a file damaged."""
    kind = drawn.draw(st.sampled_from(["LoRA", "PEFT", "full model"]))
    model = _model(kind, denoiser())
    place = model.save_pretrained(folder / "saved", include_head=True)
    files = [path for path in sorted(place.iterdir()) if path.suffix in (".json", ".safetensors")]
    path = drawn.draw(st.sampled_from(files))
    whole, changes_setting = path.read_bytes(), path.suffix == ".json" and drawn.draw(st.booleans())
    header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else len(whole)
    if changes_setting:
        content = json.loads(whole)
        name, value = drawn.draw(st.sampled_from(sorted(content))), drawn.draw(st.sampled_from(HOSTILE) | st.floats())
        path.write_text(json.dumps({**content, name: value}))
        what, in_values = f"{kind}, {path.name}: {name} = {repr(value)[:30]}", False
    else:
        in_header = drawn.draw(st.booleans())
        how, at = damaged(path, drawn, header if in_header else len(whole))
        what, in_values = f"{kind}, {path.name}: {how}", how.startswith("bit") and at >= header
    expected = {name: value.clone() for name, value in model.state_dict().items()}

    def load() -> None:
        again = cameo.from_pretrained(place, base_model=denoiser())
        state = again.state_dict()
        require(all(value.isfinite().all() for value in state.values()), "weights that are no finite numbers")
        same = state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
        if not same and in_values:
            raise NotDetectableError("a value of the weights differs")
        if path.suffix == ".safetensors":
            require(same, "other weights")

    return what, load


def shards(drawn: st.DataObject, folder: Path) -> tuple[str, Callable[[], Any]]:
    """A folder of matches with one bit changed or a file cut."""
    grids = ((2, 3), (2, 4))
    with MatchWriter(folder, {"correspondence": "depth"}) as writer:
        for first, second in ((0, 1), (1, 0)):
            index = np.arange((6, 8)[first]) % (6, 8)[second] - 1
            writer.add(0, first, second, (grids[first], grids[second]), index, np.ones(len(index)))
    finish_share(folder, {}, "plan")

    def read() -> Any:
        return MatchReader(folder).read(0, [0, 1], grids, distances=True) if is_finished(folder, "plan") else None

    expected = read()
    path = drawn.draw(st.sampled_from([path for path in sorted(folder.iterdir()) if path.stat().st_size]))
    how, _ = damaged(path, drawn)

    def compare() -> None:
        found = read()
        require(
            found is None
            or (torch.equal(found.index, expected.index) and torch.equal(found.distance, expected.distance)),
            "other matches",
        )

    return f"{path.name}: {how}", compare


def posed_images(drawn: st.DataObject, folder: Path) -> tuple[str, Callable[[], Any]]:
    """A folder of posed images in one of the formats that are read, a file damaged or a number of a text changed."""
    name = drawn.draw(st.sampled_from(sorted(WRITERS)))
    room = WRITERS[name](folder / "room", room_views())
    files = [path for path in sorted(room.rglob("*")) if path.is_file() and path.stat().st_size]
    texts = [path for path in files if path.suffix in (".txt", ".json")]

    def read() -> None:
        found = open_views(room, size=(32, 32), intrinsics=CALIBRATION if name == "rgbd tum" else None)
        for scene in range(len(found)):
            require_valid(found.views(scene))

    read()
    if texts and drawn.draw(st.booleans()):
        path = drawn.draw(st.sampled_from(texts))
        text = path.read_text()
        number = drawn.draw(st.sampled_from(list(re.finditer(r"-?\d[\d.e+-]*", text))))
        value = drawn.draw(st.sampled_from(HOSTILE) | st.floats() | st.integers())
        path.write_text(f"{text[: number.start()]}{value}{text[number.end() :]}", errors="replace")
        how = f"{number[0]} is {repr(value)[:30]}"
    else:
        path = drawn.draw(st.sampled_from(files))
        how, _ = damaged(path, drawn)

    def read_damaged() -> None:
        read()
        raise NotDetectableError("other values, all valid")

    return f"{name}, {path.relative_to(room)}: {how}", read_damaged


def require_valid(views: Views) -> None:
    """Raise `SilentWrongError` where views break what their documentation promises."""
    rotation, focal = views.extrinsics[:, :3, :3], views.intrinsics[:, [0, 1], [0, 1]]
    require(views.images.dtype == torch.uint8 or views.images.isfinite().all(), "colors that are no numbers")
    require(views.extrinsics.isfinite().all() and views.intrinsics.isfinite().all(), "cameras that are no numbers")
    require((rotation @ rotation.mT - torch.eye(3)).abs().max() < 1e-2, "a pose that is no rotation")
    require((torch.linalg.det(rotation) > 0).all(), "a pose that mirrors")
    require((focal > 0).all(), "focal lengths that are not positive")


def run_settings(drawn: st.DataObject, folder: Path) -> tuple[str, Callable[[], Any]]:
    """A setting of a training with a value of another type or out of range, in a file or on the command line."""
    path = folder / "run.yaml"
    name = drawn.draw(st.sampled_from(sorted(TrainingConfig.__dataclass_fields__)))
    value = drawn.draw(st.sampled_from(HOSTILE) | st.floats() | st.integers() | st.text(max_size=20))
    text = json.dumps(value) if not isinstance(value, str) else value
    if drawn.draw(st.booleans()):
        path.write_text("preset: tiny\n")
        return f"{name}={text[:30]}", lambda: _loaded(path, [f"{name}={text}"], name)
    path.write_text(f"{name}: {text}\n".replace("\0", ""))
    return f"{name}: {text[:30]} in a file", lambda: _loaded(path, [], name)


def _loaded(path: Path, overrides: list[str], name: str) -> None:
    value = getattr(load_config(path, overrides), name)
    if isinstance(value, float):
        require(math.isfinite(value), f"{name} is {value}")


Draw = Callable[[st.DataObject, Path], tuple[str, Callable[[], Any]]]
GROUPS: dict[str, tuple[Draw, float]] = {
    "cameras, depth, token grids, correspondences": (geometry, 0.25),
    "saved adapters and models": (saved, 0.25),
    "folders of matches": (shards, 0.1),
    "posed images on disk": (posed_images, 0.25),
    "settings": (run_settings, 0.15),
}


def try_one(group: str, drawn: st.DataObject) -> Case:
    """Draw one bad input of a group and run it."""
    logging.disable(logging.ERROR)  # PEFT prints what it could not load
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
            what, act = GROUPS[group][0](drawn, Path(folder))
            return Case(group, what, *outcome_of(act))
    finally:
        logging.disable(logging.NOTSET)


def drawn_cases(group: str, inputs: int, number: int) -> list[Case]:
    """Try so many bad inputs of one group."""
    cases: list[Case] = []

    @seed(f"{number} {group}")
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def collect(drawn: st.DataObject) -> None:
        cases.append(try_one(group, drawn))

    collect()
    return cases


def campaign(inputs: int, number: int) -> Iterator[Case]:
    """Try so many bad inputs, the same for the same number."""
    for group, (_, share) in GROUPS.items():
        yield from drawn_cases(group, round(inputs * share), number)


def table(cases: list[Case]) -> str:
    """The outcomes by group, as Markdown."""
    counts = {group: Counter(case.outcome for case in cases if case.group == group) for group in GROUPS}
    rows = [(group, sum(count.values()), *(count[name] for name in OUTCOMES)) for group, count in counts.items()]
    totals = Counter(case.outcome for case in cases)
    rows.append(("all", len(cases), *(totals[name] for name in OUTCOMES)))
    return markdown_table(("input", "tried", *OUTCOMES), rows)


def main() -> None:
    """Run the campaign, print what is not as it should be, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    begun, cases = time.monotonic(), list(campaign(chosen.inputs, chosen.seed))
    command = (
        f"OMP_NUM_THREADS=1 python -m benchmarks.reliability.bad_input --inputs {chosen.inputs} --seed {chosen.seed}"
    )
    found = f"`{command}`: {place_and_date()}, {time.monotonic() - begun:.0f} s.\n\n{table(cases)}\n"
    print(found)
    for case in cases:
        if case.outcome in ("library error", "silent wrong", "hang"):
            print(f"- {case.outcome}: {case.group}: {case.what!r}: {case.said!r}")
    fill(PAGE, "bad_input", found)


if __name__ == "__main__":
    main()
