"""Write the report of a run as one HTML file that needs no network, no server and no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from cameo.files import write_atomically
from cameo.report.curves import ReportedRun, curves, mean
from cameo.report.shown import ShownSetting, settings_of, without_folders

__all__ = ["Headline", "Picture", "write_report"]


@dataclass(frozen=True)
class Headline:
    """A figure that tells what the training changed.

    - `title`, `why`: what it is in a few words, and in a sentence what it tells.
    - `values`: the figure of each column, from the start to the run that is reported.
    - `show`, `show_change`: formats of a value and of a difference, as `{:.2f} dB`.
    """

    title: str
    why: str
    values: Mapping[str, float]
    show: str
    show_change: str


@dataclass(frozen=True)
class Picture:
    """A PNG file, its title, what there is to see in it, and what it shows for those who do not see it."""

    path: Path
    title: str
    caption: str
    alt: str


def write_report(
    path: str | Path,
    runs: Mapping[str, ReportedRun],
    *,
    title: str,
    about: str,
    headlines: Sequence[Headline],
    header: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    pictures: Sequence[Picture],
    settings: Any,
    facts: Mapping[str, str],
    explore: Path | None = None,
) -> Path:
    """Write one self-contained HTML file about a finished run, or runs that are compared; returns its path.

    Secrets are left out, and the folders of absolute paths, wherever they stand.

    Args:
        path: of the file, which is written whole.
        runs: name to what was recorded, the run without CAMEO first.
        title, about: heading, and a sentence below it.
        headlines: figures that are shown large.
        header, rows: the table: names of its columns, and title of each row with its cells.
        pictures: embedded as they are.
        settings: dataclass of the settings of the (last) run.
        facts: versions, device, seconds: name to text.
        explore: page of `cameo explore` in the same folder, to which a link leads.

    Raises:
        OSError: if a picture cannot be read, or the file not be written.
    """
    path = Path(path)
    folder = resources.files("cameo.report") / "page"
    parts = {
        "title": _text(title),
        "about": _text(about),
        "css": (folder / "page.css").read_text("utf-8"),
        "alarms": _alarms(runs),
        "headlines": "".join(['<div class="cards">', *map(_card, headlines), "</div>"]) if headlines else "",
        "table": _table(header, rows),
        "curves": curves(runs),
        "pictures": "".join([*_link(explore), *map(_picture, pictures)]) or "<p>None were drawn.</p>",
        "settings": _settings(settings_of(settings), list(runs)),
        "facts": _facts(facts),
    }
    write_atomically(path, Template((folder / "page.html").read_text("utf-8")).substitute(parts))
    return path


def _text(text: str) -> str:
    return html.escape(without_folders(text))


def _alarms(runs: Mapping[str, ReportedRun]) -> str:
    told = []
    for name, run in runs.items():
        for alarm in run.alarms:
            parts = [f"<strong>{_text(part)}:</strong> {_text(text)}" for part, text in alarm.items()]
            parts[0] += f" ({_text(f'run {name}')})" if len(runs) > 1 else ""
            told.append(f"<p>{'<br>'.join(parts)}</p>")
    if told:
        return f'<div class="alarm" role="alert"><h2>Look at this first</h2>{"".join(told)}</div>'
    sentences = [sentence for name, run in runs.items() for sentence in _fine(name, run)]
    return f'<div class="fine"><p>No alarm. {" ".join(sentences)}</p></div>'


def _fine(name: str, run: ReportedRun) -> Iterator[str]:
    """Say where the supervision of a run without an alarm stands."""
    steps = [entry for entry in run.steps if entry.get("alignment_chance")][-50:]
    if steps:
        loss, chance = (mean(steps, key) for key in ("alignment_loss", "alignment_chance"))
        share = mean(steps, "supervised") / mean(steps, "matchable")
        yield (
            f"Run {_text(name)}: the alignment loss ended at {loss:.2f}, where uniform attention has {chance:.2f}; "
            f"{share:.0%} of the tokens had a match (means of the last {len(steps)} supervised steps)."
        )


def _card(headline: Headline) -> str:
    names, values = list(headline.values), list(headline.values.values())
    low, high = min(values), max(values)
    places = [8 + 84 * (value - low) / ((high - low) or 1) for value in values]
    items = [
        f'<li><span>{_text(name)}</span><span class="track"><i class="{"last" if name == names[-1] else "first"}" '
        f'style="left:{place:.1f}%"></i></span><b>{headline.show.format(value)}</b></li>'
        for name, value, place in zip(names, values, places, strict=True)
    ]
    against = [
        f"{_text(name)}: {_change(headline, values[-1] - value)}"
        for name, value in zip(names[1:-1], values[1:-1], strict=True)
    ]
    also = f"; against {', '.join(against)}" if against else ""
    return (
        f'<div class="card"><h3>{_text(headline.title)}</h3>'
        f'<p class="big">{_change(headline, values[-1] - values[0])}</p>'
        f'<p class="against">{_text(names[-1])} against {_text(names[0])}{also}</p>'
        f'<ol>{"".join(items)}</ol><p class="why">{_text(headline.why)}</p></div>'
    )


def _change(headline: Headline, difference: float) -> str:
    return headline.show_change.format(difference).replace("-", "\u2212")  # a minus as wide as the plus


def _table(header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("measured on the validation set", *header))
    body = "".join(
        f'<tr><th scope="row">{_text(title)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for title, cells in rows.items()
    )
    return _scrolled(f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>', "Table")


def _scrolled(content: str, label: str) -> str:
    """Let what is wider than a phone scroll by itself, with the keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{_text(label)}">{content}</div>'


def _link(explore: Path | None) -> list[str]:
    if explore is None:
        return []
    name = html.escape(explore.name)
    return [f'<p><a href="{name}">{name}</a>, in the same folder: click a token and see where each model looks.</p>']


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{_text(picture.alt)}">'
    return (
        f'<figure class="picture"><h3>{_text(picture.title)}</h3><figcaption>{_text(picture.caption)} '
        f'<span class="swipe">It scrolls sideways.</span></figcaption>{_scrolled(image, picture.title)}</figure>'
    )


def _settings(settings: Sequence[ShownSetting], runs: Sequence[str]) -> str:
    of = f" of the run {_text(runs[-1])}" if len(runs) > 1 else ""
    changed = [one for one in settings if one.differs]
    rows = "".join(
        f'<tr><th scope="row"><code>{_text(one.name).replace("_", "_<wbr>")}</code></th>'
        f"<td>{_text(one.value)}</td><td>{_text(one.default)}</td></tr>"
        for one in changed
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("setting", "value", "default"))
    table = f'<table class="changed"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    whole = "".join(f"<dt>{_text(one.name)}={_text(one.value)}</dt><dd>{_text(one.comment)}</dd>" for one in settings)
    return (
        f"<p>{len(changed)} of {len(settings)} settings{of} differ from their defaults.</p>"
        f"{_scrolled(table, 'Settings that differ from their defaults')}"
        f'<details><summary>All settings, and what they mean</summary><dl class="list">{whole}</dl></details>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in facts.items())
    return f'<dl class="facts">{rows}</dl>'
