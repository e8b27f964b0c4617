"""What a recipe shows of a run: pictures, the table of its validations, the metrics of a model card, `report.html`."""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cameo.data import MultiViewDataset, collate
from cameo.data.batches import to_device
from cameo.evaluation.match_errors import FoundMatches, find_matches
from cameo.evaluation.pictures import comparison_figure, match_error_figure, save_figure
from cameo.explore.write import ShownModel, write_page
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.probing.denoising import covisible_pixels
from cameo.probing.mode import base_weights, evaluation_mode, generate_views, has_adapter, native_precision
from cameo.report import Headline, Picture, ReportedRun, write_report
from cameo.tables import markdown_table
from cameo.training.records import TrainingResult
from cameo.training.settings import TrainingConfig
from cameo.version import __version__

__all__ = [
    "card_metrics",
    "card_pictures",
    "device_name",
    "metrics_table",
    "noise_inputs",
    "predicted_views",
    "write_attention_page",
    "write_pictures",
    "write_run_report",
]

NOT_MEASURED = "-"
PAGE_BUDGET = 6 * 10**6  # bytes of the maps on the page that a run leaves behind


@dataclass(frozen=True)
class _Drawn:
    """What is drawn of one model: its images of all views by how they were made, and where its attention looks.

    `found` is the reason as an error where the attention cannot be drawn.
    """

    images: dict[str, torch.Tensor]
    found: FoundMatches | ValueError


def write_pictures(
    models: Mapping[str, CameoModel],
    pipeline: MultiViewPipeline,
    dataset: MultiViewDataset,
    config: TrainingConfig,
    folder: str | Path,
    *,
    show_base: bool = False,
) -> list[Path]:
    """Draw predictions and attention of one or several models, by name; returns the files.

    Each model is shown twice: the clean image that it predicts from pure noise in one step, which the validation
    measures, and sampled in `num_inference_steps`. All models get the same samples and the same noise. Where no
    attention can be drawn, a warning says why; `num_validation_images=0` draws nothing.

    With `show_base` the first model is shown before its training too, with its LoRA switched off; a model without a
    LoRA has no base left to show.
    """
    if not config.num_validation_images:
        return []
    first = next(iter(models.values()))
    samples = [dataset[index] for index in range(config.num_validation_images)]
    batch = to_device(collate(samples), next(first.parameters()).device)
    inputs = noise_inputs(pipeline, batch, config)
    drawn: dict[str, _Drawn] = {}
    if show_base and has_adapter(first):
        with base_weights(first):
            drawn["base"] = _draw(first, pipeline, batch, inputs, config, trained_head=False)
    for name, model in models.items():
        trained_head = model.cameo_config.weight > 0
        drawn[name] = _draw(model, pipeline, batch, inputs, config, trained_head=trained_head)
    folder = Path(folder)
    images = {name: one.images for name, one in drawn.items()}
    pixels = _measured_pixels(batch)
    views = comparison_figure(batch, images, samples=len(samples), pixels=pixels)
    if pixels is not None:
        seen = "that a reference view sees" if batch["num_reference_views"] else "of the view"
        views.supxlabel(f"below each prediction: PSNR over the pixels {seen}", fontsize=8)
    written = [save_figure(views, folder / "views.png")]
    found = {name: one.found for name, one in drawn.items() if isinstance(one.found, FoundMatches)}
    if not found:
        warnings.warn(f"attention.png is left out: {next(iter(drawn.values())).found}", stacklevel=2)
        return written
    return [*written, save_figure(match_error_figure(batch, found, samples=len(samples)), folder / "attention.png")]


def write_attention_page(
    models: Mapping[str, CameoModel],
    pipeline: MultiViewPipeline,
    dataset: MultiViewDataset,
    config: TrainingConfig,
    path: str | Path,
    *,
    show_base: bool = False,
) -> Path | None:
    """Write the page on which a click on a token shows where the models look; see `cameo.explore`.

    It shows `num_validation_images` samples, none with 0. Where the layer has no maps over whole views, a warning says
    so, and None is returned. The other arguments are those of `write_pictures`.
    """
    if not config.num_validation_images:
        return None
    first = next(iter(models.values()))
    samples = [dataset[index] for index in range(config.num_validation_images)]
    batch = to_device(collate(samples), next(first.parameters()).device)
    shown = {name: ShownModel(model, model.cameo_config.weight > 0) for name, model in models.items()}
    if show_base and has_adapter(first):
        shown = {"base": ShownModel(first, trained_head=False, base=True), **shown}
    try:
        return write_page(path, shown, pipeline, batch, title=f"Where {config.backbone} looks", budget=PAGE_BUDGET)
    except ValueError as error:
        warnings.warn(f"{Path(path).name} is left out: {error}", stacklevel=2)
        return None


def noise_inputs(pipeline: MultiViewPipeline, batch: Mapping[str, Any], config: TrainingConfig) -> TrainingInputs:
    """Return the inputs of the denoiser at pure noise, the same for every model that is shown."""
    with evaluation_mode(pipeline.denoiser):  # without what a pipeline does in training only
        return pipeline.training_inputs(
            batch,
            timesteps=torch.full((len(batch["images"]),), pipeline.num_train_timesteps - 1),
            generator=torch.Generator().manual_seed(config.data_seed),
        )


def predicted_views(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    batch: Mapping[str, Any],
    inputs: TrainingInputs,
    config: TrainingConfig,
) -> dict[str, torch.Tensor]:
    """Return the images of all views `[B, V, 3, H, W]` by how they were made: in one step, and sampled.

    The reference views are as they are. What is predicted in one step is the clean image in the `inputs`.
    """
    with evaluation_mode(model), native_precision(model):
        in_one_step = pipeline.predict_clean(model.base_model(*inputs.args, **inputs.kwargs), inputs)
    sampled = generate_views(
        model,
        pipeline,
        batch,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(config.data_seed),
    )
    return {"one-step prediction": in_one_step, f"sampled in {config.num_inference_steps} steps": sampled}


def _measured_pixels(batch: dict[str, Any]) -> torch.Tensor | None:
    """Pixels over which the PSNR of a picture is taken: those that a reference sees, all where there is none."""
    if not batch["num_reference_views"]:
        return torch.ones_like(batch["images"][:, :, :1], dtype=torch.bool)
    return covisible_pixels(batch) if "depth" in batch and bool((batch["depth"] > 0).any()) else None


def _draw(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    batch: Mapping[str, Any],
    inputs: TrainingInputs,
    config: TrainingConfig,
    *,
    trained_head: bool,
) -> _Drawn:
    found: FoundMatches | ValueError
    try:
        found = find_matches(model, batch, inputs, through_head=trained_head)
    except ValueError as error:
        found = error
    return _Drawn(predicted_views(model, pipeline, batch, inputs, config), found)


def card_metrics(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Pick what a model card shows of validation results, side by side, in words that need no glossary.

    Example:
        >>> measured = {"loss": 0.26761, "psnr_covisible": None, "psnr_all": 11.9743, "precision": {"mean@1": 0.45661}}
        >>> for name, figure in card_metrics({"with CAMEO": measured})["with CAMEO"].items():
        ...     print(f"{name}: {figure}")
        PSNR of the predicted view, all pixels (dB): 11.97
        attention finds the true match within one token (%): 45.7
        denoising loss: 0.2676
    """
    return {title: _card_figures(measured) for title, measured in columns.items()}


def _card_figures(measured: Mapping[str, Any]) -> dict[str, float]:
    precision, views = measured["precision"] or {}, measured.get("precision_view") or {}
    figures = {
        "PSNR of the predicted view where the reference sees it (dB)": (measured["psnr_covisible"], 1, 2),
        "PSNR of the predicted view, all pixels (dB)": (measured["psnr_all"], 1, 2),
        "attention finds the true match within one token (%)": (precision.get("mean@1"), 100, 1),
        "attention prefers a view that shows the same point (%)": (views.get("mean"), 100, 1),
        "the same by chance (%)": (views.get("chance"), 100, 1),
        "denoising loss": (measured["loss"], 1, 4),
    }
    return {name: round(value * unit, digits) for name, (value, unit, digits) in figures.items() if value is not None}


def card_pictures(pictures: Sequence[Path]) -> dict[str, Path]:
    """Give the pictures of `write_pictures` the captions of a model card, which say what there is to see."""
    captions = {
        "views": "Samples of the validation set. From left to right: the view that the model is given, if any, "
        "the true target view, and what each model makes of it, predicted from pure noise in one step and sampled in "
        "several. The closer to the true view the better; below each is the PSNR.",
        "attention": "Where the supervised attention looks, token by token of the target view. Blue: its strongest "
        "attention is on the true match in the other view, or one token off. Yellow and orange: it looks elsewhere. "
        "Gray: the other view does not show that point. The more blue the better.",
    }
    return {captions.get(path.stem, path.stem): path for path in pictures}


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Format validation results side by side as a Markdown table."""
    return markdown_table(["", *columns], [[title, *cells] for title, cells in _rows(columns).items()])


def _rows(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the rows of the table by their title, without those of which nothing was measured."""
    covisible = "PSNR of predicted clean image at high noise, pixels the reference sees (dB)"
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "denoising loss, fixed noise": lambda m: f"{m['loss']:.4f}",
        covisible: lambda m: _figure(m["psnr_covisible"], ".2f"),
        "the same, all target pixels (dB)": lambda m: f"{m['psnr_all']:.2f}",
        "attention precision, mean of heads, exact token": lambda m: _share(m, "mean@0"),
        "attention precision, mean of heads, within 1 token": lambda m: _share(m, "mean@1"),
        "attention precision, best head, within 1 token": lambda m: _share(m, "best_head@1"),
        "attention precision, through the alignment head, within 1 token": lambda m: _share(m, "through_head@1"),
        "share of queries whose most-attended view shows the same point": lambda m: _view_share(m, "mean"),
        "the same by chance": lambda m: _view_share(m, "chance"),
    }
    shown = {title: [show(metrics) for metrics in columns.values()] for title, show in rows.items()}
    return {title: cells for title, cells in shown.items() if any(cell != NOT_MEASURED for cell in cells)}


def _share(metrics: Mapping[str, Any], name: str) -> str:
    return _figure((metrics["precision"] or {}).get(name), ".1%")


def _view_share(metrics: Mapping[str, Any], name: str) -> str:
    return _figure((metrics.get("precision_view") or {}).get(name), ".1%")


def _figure(value: float | None, format_spec: str) -> str:
    return NOT_MEASURED if value is None else format(value, format_spec)


# What there is to see in each picture, by the name of its file, and what it shows for those who do not see it.
PICTURES = {
    "views": (
        "Predicted views",
        "Samples of the validation set, which no run saw: the reference view, the true target view, and what "
        "each model makes of it, from pure noise in one step and sampled. A better model puts the colors and edges of "
        "the reference where the true view has them; its PSNR is higher.",
        "Grid of images: rows are samples, columns the reference view, the true view and the prediction of each model, "
        "with its PSNR below.",
    ),
    "attention": (
        "Where the attention finds the match",
        "Each token of the target view is colored by how far the token that it attends to most in the reference view "
        "lies from its true match: dark blue is the match itself, orange is four tokens off or more, gray has no "
        "match. The more blue, the better the attention knows where a surface point is in the other view.",
        "Grid of maps: rows are samples, columns the two views and for each model a map of the tokens, colored by the "
        "distance from the most-attended token to the true match, with the share within one token above.",
    ),
}


def write_run_report(
    results: Mapping[str, TrainingResult],
    model: CameoModel,
    config: TrainingConfig,
    path: str | Path,
    *,
    pictures: Sequence[Path],
    start: str,
    explore: Path | None = None,
) -> Path:
    """Write `report.html` of a finished recipe; returns its path. See `cameo.report`.

    Args:
        results: of each run of the recipe, by name; the last one is that of `model` and `config`.
        model: for the layers that are supervised, and the device.
        config: the settings.
        path: of the file.
        pictures: what `write_pictures` returned.
        start: what the model is before the training, as "base".
        explore: page of `write_attention_page`, in the same folder.
    """
    *_, last = results.values()
    columns = {f"{start} (step {last.validations[0]['step']})": last.validations[0]}
    columns |= {name: result.validations[-1] for name, result in results.items()}
    folder = Path(config.output_dir)
    run = f"config={'' if folder.is_absolute() else f'{folder.as_posix()}/'}config.yaml"
    shown = [Picture(picture, *PICTURES.get(picture.stem, (picture.stem, "", picture.stem))) for picture in pictures]
    layers = ", ".join(layer.path for layer in model.supervised_layers)
    return write_report(
        path,
        {
            name: ReportedRun(result.history(), result.validations, [alarm.parts(run) for alarm in result.alarms])
            for name, result in results.items()
        },
        title=f"Report of {folder.resolve().name}",
        about=f"{config.backbone} from {model.cameo_config.base_model}; layer {layers}; {last.step} steps of "
        f"{config.train_batch_size * config.gradient_accumulation_steps} samples with {config.num_views} views.",
        headlines=_headlines(columns),
        header=list(columns),
        rows=_rows(columns),
        pictures=shown,
        settings=config,
        facts=_facts(results, next(model.parameters()).device),
        explore=explore,
    )


def _headlines(columns: Mapping[str, Mapping[str, Any]]) -> list[Headline]:
    figures: list[tuple[str, str, Callable[[Mapping[str, Any]], float | None], str, str]] = [
        (
            "Predicted view, where the reference sees it",
            "PSNR of the clean image that is predicted from high noise; higher is better.",
            lambda m: m["psnr_covisible"],
            "{:.2f}",
            "{:+.2f} dB",
        ),
        (
            "Attention finds the match (%)",
            "Share of tokens whose most-attended token lies within one token of the true match, mean of the heads.",
            lambda m: None if m["precision"] is None else 100 * m["precision"]["mean@1"],
            "{:.1f}",
            "{:+.1f} points",
        ),
        (
            "Denoising loss",
            "The same samples and the same noise at each noise level; lower is better.",
            lambda m: m["loss"],
            "{:.4f}",
            "{:+.4f}",
        ),
    ]
    headlines = []
    for title, why, value, show, show_change in figures:
        values = {name: found for name, metrics in columns.items() if (found := value(metrics)) is not None}
        if len(values) == len(columns):
            headlines.append(Headline(title, why, values, show, show_change))
    return headlines


def _facts(results: Mapping[str, TrainingResult], device: torch.device) -> dict[str, str]:
    packages = ("torch", "diffusers", "peft", "accelerate")
    seconds = {
        f"time of the run {name}": f"{result.seconds:.0f} s, validation included" for name, result in results.items()
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        **seconds,
        "cameo": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture of the CPU.

    Example:
        >>> device_name(torch.device("cpu")).endswith(" CPU")
        True
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
