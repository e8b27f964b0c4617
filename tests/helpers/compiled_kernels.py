"""What a Triton kernel takes on a GPU, from compiling it without one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


def registers_and_stack(
    kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, int], capability: int, num_warps: int
) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills to the stack; skips where Triton has no tool that tells.

    Args:
        kernel: compiled by `triton.jit`.
        kinds: type of each argument that is no constant, as "*fp32".
        constants: values of the others.
        capability: of the GPU, as 90.
        num_warps: of a block.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this build of Triton has no cuobjdump")
    source = ASTSource(kernel, {**kinds, **dict.fromkeys(constants, "constexpr")}, dict(constants))
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    return registers, stack
