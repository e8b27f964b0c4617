"""The checks for a GPU pass where their tensors are on the CPU, so that a failure is the GPU's."""

from __future__ import annotations

import pytest

from benchmarks.gpu import check_core


@pytest.mark.slow
def test_the_checks_of_the_core_pass_on_the_device_of_their_truth(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_core.main(["--device", "cpu"]) == 0, capsys.readouterr().out
    assert "torch.float16" in capsys.readouterr().out
