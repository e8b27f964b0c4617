"""Does one see which model was trained with CAMEO? Pictures of held-out scenes in shuffled columns, to be judged blind.

    python -m benchmarks.convergence.blind outputs/lora-cat3d-tiny                        # draw the pictures
    python -m benchmarks.convergence.blind outputs/lora-cat3d-tiny --answers LRLLRLRRLR   # judge them afterwards

The first command takes a finished run of `recipes/lora_finetune.py` with `compare_without_cameo=true`, and writes
`blind/scene-01.png` and so on into its folder. Each picture shows a scene on which the run was neither trained nor
validated: the reference, the truth, and the views of the two models, left and right in an order that the operating
system draws for each scene. The order stands in `blind/key.json`, which is not to be opened before the pictures are
judged. The second command takes one letter for each scene, L or R: the column that is nearer to the truth. It opens the
key, counts how often that was the model with CAMEO, and writes `blind/result.json`. Pictures are judged once.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cameo.data import MultiViewDataset, collate
from cameo.data.batches import to_device
from cameo.evaluation.pictures import comparison_figure, save_figure
from cameo.files import write_atomically
from cameo.training.data import build_dataset, data_format
from cameo.training.output_folder import WITHOUT_CAMEO
from cameo.training.report import noise_inputs, predicted_views
from cameo.training.runs import EvaluatedModel, load_evaluated
from cameo.training.settings import TrainingConfig

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDER, KEY, RESULT = "blind", "key.json", "result.json"
WITH, WITHOUT = "with CAMEO", "without CAMEO"
LETTERS = "LR"
# Samples that are looked at for each scene that is drawn, before the data is said to have too few.
PATIENCE = 50


def draw(run: Path, scenes: int, *, redraw: bool = False) -> list[Path]:
    """Draw the pictures of a finished run and keep their order in the key; returns the pictures.

    Raises:
        SystemExit: if the run is not finished or has no run without CAMEO, or pictures were drawn already.
    """
    folder = run / FOLDER
    if (folder / KEY).exists() and not redraw:
        raise SystemExit(f"{folder}: holds pictures already; judge them with --answers, or replace them with --redraw")
    models = {WITH: _load(run), WITHOUT: _load(run / WITHOUT_CAMEO)}
    config = models[WITH].config
    samples = unseen_samples(config, scenes)
    images = {name: _images(one, samples) for name, one in models.items()}
    columns = [[WITH, WITHOUT] if secrets.randbelow(2) else [WITHOUT, WITH] for _ in samples]
    (folder / RESULT).unlink(missing_ok=True)
    written = []
    for place, (sample, order) in enumerate(zip(samples, columns, strict=True)):
        shown = {
            side: {kind: views[place : place + 1] for kind, views in images[name].items()}
            for side, name in zip(("left", "right"), order, strict=True)
        }
        figure = comparison_figure(collate([sample]), shown, samples=1)
        written.append(save_figure(figure, folder / f"scene-{place + 1:02d}.png"))
    key = {"columns": columns, "samples": [sample["key"] for sample in samples]}
    write_atomically(folder / KEY, json.dumps(key, indent=1) + "\n")
    return written


def judge(run: Path, answers: str) -> dict[str, Any]:
    """Open the key and count the hits; the result is written to `blind/result.json` and returned.

    Raises:
        SystemExit: if there are no pictures, they were judged already, or there is not one letter for each of them.
    """
    from scipy.stats import binomtest

    folder = run / FOLDER
    if not (folder / KEY).is_file():
        raise SystemExit(f"{folder}: holds no {KEY}; draw the pictures first, without --answers")
    if (folder / RESULT).exists():
        raise SystemExit(f"{folder}: was judged already, see {RESULT}; draw other pictures with --redraw")
    columns = json.loads((folder / KEY).read_text(encoding="utf-8"))["columns"]
    given = answers.upper().replace(" ", "")
    if len(given) != len(columns) or set(given) - set(LETTERS):
        raise SystemExit(f"--answers {answers}: expected one letter, L or R, for each of {len(columns)} scenes")
    chosen = [order[LETTERS.index(letter)] for order, letter in zip(columns, given, strict=True)]
    hits = chosen.count(WITH)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "answers": given,
        "key": "".join(LETTERS[order.index(WITH)] for order in columns),
        "hits": hits,
        "scenes": len(columns),
        "p_value": binomtest(hits, len(columns)).pvalue,
    }
    write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def unseen_samples(config: TrainingConfig, count: int) -> list[Any]:
    """Return samples on which a run was neither trained nor validated, each of another scene where there are several.

    Embedded scenes are those after the validation scenes of the run. A sequence has one scene: its held-out frames, in
    other samples than those of the validation.

    Raises:
        SystemExit: if the data has too few.
    """
    sequence = data_format(config) == "rgbd"
    scenes = config.num_validation_scenes
    data: MultiViewDataset = build_dataset(replace(config, num_validation_scenes=scenes + count), "validation")
    first = max(config.num_validation_samples, config.num_validation_images) if sequence else 0
    seen = {tuple(data.choose(index)[1]) for index in range(first)}
    found: dict[Any, int] = {}  # by scene, of a sequence by views
    for index in range(first, first + PATIENCE * (count + scenes)):
        scene, views = data.choose(index)
        name = tuple(views) if sequence else scene
        if name not in found and (name not in seen if sequence else scene >= scenes):
            found[name] = index
        if len(found) == count:
            return [data[index] for index in found.values()]
    raise SystemExit(f"--scenes {count}: the held-out data has {len(found)} that the run has not used; ask for fewer")


def _load(run: Path) -> EvaluatedModel:
    adapter = run / "adapter"
    if not adapter.is_dir():
        raise SystemExit(
            f"{adapter}: not found; expected the folder of a finished run of recipes/lora_finetune.py with "
            "compare_without_cameo=true"
        )
    return load_evaluated({}, RECIPES / "configs", checkpoint=str(adapter))


def _images(one: EvaluatedModel, samples: list[Any]) -> dict[str, Any]:
    """Views of all samples by how they were made; all models get the same noise."""
    batch = to_device(collate(samples), next(one.model.parameters()).device)
    inputs = noise_inputs(one.pipeline, batch, one.config)
    return predicted_views(one.model, one.pipeline, batch, inputs, one.config)


def main(arguments: list[str]) -> None:
    """Draw the pictures, or judge them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of a finished run with compare_without_cameo=true")
    parser.add_argument("--scenes", type=int, default=10, help="number of held-out scenes to draw")
    parser.add_argument("--redraw", action="store_true", help="replace the pictures, their key and their judgment")
    parser.add_argument("--answers", help="one letter for each scene, L or R: the column nearer to the truth")
    known = parser.parse_args(arguments)
    if known.answers is None:
        written = draw(known.run, known.scenes, redraw=known.redraw)
        print(f"{len(written)} pictures in {written[0].parent}; look at them before you open {KEY}")
        return
    result = judge(known.run, known.answers)
    print("hits {hits} of {scenes}, two-sided binomial p = {p_value:.3f}; key {key}".format(**result))


if __name__ == "__main__":
    main(sys.argv[1:])
