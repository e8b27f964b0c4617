"""Does CAMEO help a LoRA on a real RGB-D sequence? Same steps, data order and noise, with and without it.

    python -m benchmarks.convergence.rgbd_lora --data path/to/sequence [--seeds 0 1 2] [key=value ...]

Trains a LoRA on the bundled base at 32 px with 4 views on the first four fifths of the sequence and measures on
the held-out last fifth. Each finished run is kept in `benchmarks/results/rgbd_lora/`, so an interrupted benchmark
continues; the table and the curves are written from those files.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.common import page
from cameo.evaluation.pictures import save_figure
from cameo.files import write_atomically
from cameo.settings import shown_settings
from cameo.tables import markdown_table
from cameo.training.data import build_dataset
from cameo.training.settings import TrainingConfig, load_config
from cameo.training.setup import train_lora

HERE = Path(__file__).parent
SETTINGS = HERE / "rgbd_lora.yaml"
RESULTS = page.RESULTS / "rgbd_lora"
ARMS = {"without": 0.0, "cameo": None}  # None: the weight of the settings file
ROWS = {
    "attention precision, mean of heads, within 1 token (%)": lambda m: 100 * m["precision"]["mean@1"],
    "attention precision, mean of heads, exact token (%)": lambda m: 100 * m["precision"]["mean@0"],
    "attention precision, best head, within 1 token (%)": lambda m: 100 * m["precision"]["best_head@1"],
    "covisible PSNR at high noise (dB)": lambda m: m["psnr_covisible"],
    "PSNR of all target pixels at high noise (dB)": lambda m: m["psnr_all"],
    "denoising loss, fixed noise": lambda m: m["loss"],
}


def run(config: TrainingConfig, seed: int, arm: str) -> dict[str, Any]:
    """Train one arm with one seed and return its validations."""
    weight = config.loss_weight if ARMS[arm] is None else ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(config, seed=seed, loss_weight=weight, output_dir=folder, report_to="none")
        train, held_out = build_dataset(settings, "train"), build_dataset(settings, "validation")
        start = time.time()
        finished = train_lora(settings, train, held_out)
        history = finished.result.history()
    return {
        "arm": arm,
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        if finished.trainer.device.type == "cpu"
        else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds": round(time.time() - start, 1),
        "settings": {k: v for k, v in shown_settings(config).items() if k not in ("output_dir", "train_data_dir")},
        "validations": finished.validations,
        "losses": [[entry["step"], entry["loss"], entry["alignment_loss"]] for entry in history[9::10]],
    }


def report(results: list[dict[str, Any]]) -> str:
    """Write the table of the last validations, per seed, with the differences."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for result in results:
        by_seed.setdefault(result["seed"], {})[result["arm"]] = result["validations"][-1]
    first = results[0]
    steps = first["validations"][-1]["step"]
    lines = [
        "# LoRA on a real RGB-D room, with and without CAMEO",
        "",
        f"`python -m benchmarks.convergence.rgbd_lora --data rgbd_room`, {first['date']}, {first['device']}, torch "
        f"{first['torch']}; {steps} steps per run, settings in `rgbd_lora.yaml`, held-out frames only. "
        "Each cell: before -> without CAMEO / with CAMEO (difference).",
        "",
    ]
    rows = []
    before = {result["seed"]: result["validations"][0] for result in results}
    for title, value in ROWS.items():
        cells = []
        for seed, arms in by_seed.items():
            low, high = value(arms["without"]), value(arms["cameo"])
            cells.append(f"{value(before[seed]):.4g} -> {low:.4g} / {high:.4g} ({high - low:+.3g})")
        rows.append([title, *cells])
    seconds = {arm: [r["seconds"] for r in results if r["arm"] == arm] for arm in ARMS}
    shown = ", ".join(f"{arm} {sum(values) / len(values):.0f} s" for arm, values in seconds.items())
    lines += [markdown_table(["", *(f"seed {seed}" for seed in by_seed)], rows)]
    lines += ["", f"Mean wall time of a run with its validations: {shown}.", "", "![curves](curves.png)"]
    return "\n".join(lines) + "\n"


def curves(results: list[dict[str, Any]]) -> Figure:
    """Draw the validation curves of all runs."""
    titles = list(ROWS)
    shown = [titles[0], titles[3], titles[5]]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, title in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for result in results:
            points = [(entry["step"], ROWS[title](entry)) for entry in result["validations"]]
            colour = "tab:orange" if result["arm"] == "cameo" else "tab:blue"
            label = {"cameo": "with CAMEO", "without": "without"}[result["arm"]] if result["seed"] == 0 else None
            axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=".")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("LoRA steps")
        axis.legend(fontsize=8)
    return figure


def main(arguments: list[str]) -> None:
    """Run what is missing, then print and write the table and the curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of an RGB-D sequence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    known, overrides = parser.parse_known_args(arguments)
    config = load_config(SETTINGS, [f"train_data_dir={known.data}", *overrides])
    results = []
    for seed in known.seeds:
        for arm in ARMS:
            path = RESULTS / f"{arm}-{seed}.json"
            if not path.is_file():
                write_atomically(path, json.dumps(run(config, seed, arm), indent=1) + "\n")
            results.append(json.loads(path.read_text(encoding="utf-8")))
    save_figure(curves(results), RESULTS / "curves.png")
    table = report(results)
    write_atomically(RESULTS / "README.md", table)
    print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
