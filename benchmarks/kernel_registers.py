"""Compile the Triton kernels of the alignment head without a GPU and print what they need.

    python benchmarks/kernel_registers.py                      # every head count, A100 and H100
    python benchmarks/kernel_registers.py --heads 10 --architecture 90

Per kernel: registers of a thread (255 at most), spilled registers (loads and stores of local memory), shared memory,
and the thread instructions per pair of a query and a key, counted in the machine code of the loop over tiles. A GPU
issues 128 thread instructions per processor and cycle at most: an H100 29.7e12 per second.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cameo.alignment import triton_head_kernels as kernels
from cameo.alignment.triton_heads import GRADIENT_OPTIONS, SCORES_CONFIGURATIONS, TILE, HeadPlan, softmax_tile
from cameo.tables import markdown_row, markdown_table

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COLUMNS = ("kernel", "K", "logits", "GELU", "sm", "registers", "spills", "shared bytes", "instructions per pair")
HEADS = (5, 8, 10, 20, 32)
ARCHITECTURES = (80, 90)
DTYPES = ("fp32", "bf16")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel needs.

    `spills` counts instructions, `shared` bytes; `instructions` are per pair, None where that has no meaning.
    """

    registers: int
    spills: int
    shared: int
    instructions: float | None


def measure_scores(
    heads: int, dtype: str, architecture: int, *, configuration: int = 0, gelu: str = "exact"
) -> Figures:
    """Figures of the forward kernel in one of its tuned configurations."""
    unroll, stages = SCORES_CONFIGURATIONS[configuration]
    plan = HeadPlan(heads, 4 * heads)
    constants = _constants(plan, heads, dtype, gelu) | {"UNROLL": unroll}
    pointers = {"logits": dtype, "packed": "fp32", "weight_out": "fp32", "scores": "fp32"}
    numbers = {"pairs": "i32", "units": "i32"}
    compiled = _compile(kernels.scores_kernel, pointers, numbers, constants, architecture, stages=stages)
    return _figures(compiled, exponentials=8 * plan.chunks)


def measure_gradient(
    heads: int, dtype: str, architecture: int, *, gelu: str = "exact", units: int | None = None
) -> list[Figures]:
    """Figures of the backward kernel; of two where the weights need a sweep of their own, per group of units."""
    plan = HeadPlan(heads, units or 4 * heads)
    pointers = {"logits": dtype, "packed": "fp32", "score_gradients": "fp32", "partial": "fp32"}
    figures = []
    for for_logits, for_weights in [(True, True)] if plan.groups == 1 else [(False, True), (True, False)]:
        constants = _constants(plan, heads, dtype, gelu) | {
            "GROUP": plan.group_chunks,
            "FOR_LOGITS": for_logits,
            "FOR_WEIGHTS": for_weights,
        }
        stages = GRADIENT_OPTIONS["num_stages"]
        compiled = _compile(kernels.gradient_kernel, pointers, {"pairs": "i32"}, constants, architecture, stages=stages)
        chunks = plan.group_chunks if for_weights else plan.chunks
        figures.append(_figures(compiled, exponentials=16 * chunks))
    return figures


def measure_softmax(columns: int, dtype: str, architecture: int) -> Figures:
    """Figures of the softmax of rows."""
    rows, width = softmax_tile(columns)
    constants = {"COPIES": 1, "EXCLUDES": True, "GRADIENT": True, "ROWS": rows, "COLUMNS": width}
    pointers = {"logits": dtype, "targets": "i64", "weights": "fp32", "excluded": "i64", "losses": "fp32"}
    numbers = {"rows": "i32", "columns": "i32", "targets_per_row": "i32", "scale": "fp32"}
    return _figures(_compile(kernels.softmax_kernel, pointers, numbers, constants, architecture, warps=4))


def _constants(plan: HeadPlan, heads: int, dtype: str, gelu: str) -> dict[str, object]:
    return {
        "HEADS": heads,
        "WIDTH": plan.padded_heads,
        "CHUNKS": plan.chunks,
        "FAST": gelu == "fast",
        "SPLIT": dtype == "fp32",
        "INTERPRETED": False,
        "TILE": TILE,
    }


def _compile(
    kernel: triton.JITFunction,
    pointers: dict[str, str],
    numbers: dict[str, str],
    constants: dict[str, object],
    architecture: int,
    *,
    warps: int = 1,
    stages: int = 1,
) -> triton.compiler.CompiledKernel:
    types = {name: f"*{dtype}" for name, dtype in pointers.items()} | numbers
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # As for tensors of torch, whose storage is aligned, and a number of pairs that is a multiple of 16.
    aligned = [name in pointers or name == "pairs" for name in kernel.arg_names]
    attributes = {(place,): [["tt.divisibility", 16]] for place, yes in enumerate(aligned) if yes}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def _figures(compiled: triton.compiler.CompiledKernel, exponentials: int | None = None) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _run("cuobjdump", "-sass", file.name)
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
    registers = re.search(r"\bREG:(\d+)", usage)
    instructions = [(int(place, 16), text) for place, text in INSTRUCTION.findall(listing)]
    if registers is None or not instructions:
        raise RuntimeError(f"cuobjdump: expected resource usage and machine code, got {usage!r}")
    return Figures(
        registers=int(registers[1]),
        spills=sum("STL" in text or "LDL" in text for _, text in instructions),
        shared=compiled.metadata.shared,
        instructions=None if exponentials is None else _per_pair(instructions, exponentials),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _per_pair(instructions: list[tuple[int, str]], exponentials: int) -> float:
    """Instructions that one warp issues per tile, which are those per pair: a tile has as many pairs as threads.

    How often a loop inside that over tiles runs follows from the exponentials, whose number per pair is known.
    """
    jumps = [
        (int(target[1], 16), place) for place, text in instructions if (target := re.search(r"\bBRA\b.*0x(\w+)", text))
    ]
    loops = [(first, last) for first, last in jumps if first < last and _exponentials(instructions, first, last)]
    tiles = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if loop != tiles and tiles[0] <= loop[0] and loop[1] <= tiles[1]]
    inside = [place for place, _ in instructions if any(first <= place <= last for first, last in inner)]
    once = sum(tiles[0] <= place <= tiles[1] for place, _ in instructions) - len(inside)
    if not inside:
        if _exponentials(instructions, *tiles) != exponentials:
            raise RuntimeError(f"expected {exponentials} exponentials in the loop over tiles")
        return once
    repeated = sum(_exponentials(instructions, first, last) for first, last in inner)
    times = (exponentials - _exponentials(instructions, *tiles) + repeated) / repeated
    return once + times * len(inside)


def _exponentials(instructions: list[tuple[int, str]], first: int, last: int) -> int:
    return sum(first <= place <= last and "MUFU.EX2" in text for place, text in instructions)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS)
    parser.add_argument("--architecture", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--gelu", choices=("exact", "fast"), nargs="+", default=("exact",))
    arguments = parser.parse_args()
    print(f"Triton {triton.__version__}, hidden size 4 K\n")
    print(markdown_table(COLUMNS, []))
    for architecture in arguments.architecture:
        for heads in arguments.heads:
            for dtype in DTYPES:
                for gelu in arguments.gelu:
                    for place, (unroll, stages) in enumerate(SCORES_CONFIGURATIONS):
                        figures = measure_scores(heads, dtype, architecture, configuration=place, gelu=gelu)
                        _print_row(
                            f"scores, unroll {unroll}, stages {stages}", heads, dtype, gelu, architecture, figures
                        )
                    for figures in measure_gradient(heads, dtype, architecture, gelu=gelu):
                        _print_row("gradient", heads, dtype, gelu, architecture, figures)
        for columns in (21, 1024):
            _print_row(
                f"softmax of {columns}", 1, "fp32", "", architecture, measure_softmax(columns, "fp32", architecture)
            )


def _print_row(kernel: str, heads: int, dtype: str, gelu: str, architecture: int, figures: Figures) -> None:
    per_pair = "" if figures.instructions is None else f"{figures.instructions:.0f}"
    cells = [kernel, heads, dtype, gelu, architecture, figures.registers, figures.spills, figures.shared, per_pair]
    print(markdown_row(cells), flush=True)


if __name__ == "__main__":
    main()
