"""The files that a result is written to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from PIL import Image

from cameo.evaluation.protocol import sample_targets
from cameo.evaluation.report import attention_figure, write_result
from tests.helpers.evaluations import SMALL


def test_files_of_a_result(trained: Any, result: dict[str, Any], tmp_path: Path) -> None:
    files = write_result(result, tmp_path, sampled=sample_targets(*trained, SMALL))
    names = ["attention.png", "denoising.png", "result.json", "samples.png", "scenes.png", "table.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files) == names
    assert json.loads((tmp_path / "result.json").read_text()) == result
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 20, path  # not blank
    rows = (tmp_path / "table.md").read_text().splitlines()
    loss = result["sections"]["denoising"]["mean"]["loss"]
    assert f"| denoising loss, fixed noise ↓ | {loss:.4f} | 3 |" in rows
    unsampled = copy.deepcopy(result)
    for name in ("novel_views", "consistency"):
        unsampled["sections"][name]["per_sample"] = {}
    write_result(unsampled, tmp_path)
    assert not (tmp_path / "scenes.png").exists()
    assert not (tmp_path / "samples.png").exists()
    unsampled["sections"]["attention"]["details"] = {}
    assert attention_figure(unsampled) is None
