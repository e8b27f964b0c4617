"""Compare the core on a GPU with the CPU in float64: correspondence, kernels of the loss, capture, xformers.

    python -m benchmarks.gpu.check_core [--device cuda]

Seconds on any GPU. Prints a table; exit status 1 if an error exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

import cameo
from cameo.backbone import get_backbone
from cameo.geometry import unproject
from cameo.tables import markdown_row, markdown_table

# Relative error allowed against float64 on the CPU, of the loss alone from the same rounded queries and keys ...
FUSED_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# ... and of a network. Half precision runs the whole network under autocast without
# loss scaling; on a CPU its gradients were off by 2.2 % (bfloat16) and 2.1 % (float16).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# Gradients in float16 are scaled as a GradScaler does at first: those of a mean over many rows are subnormal there.
LOSS_SCALE = 2.0**16


def batch(samples: int = 2, views: int = 3, size: int = 64) -> dict[str, torch.Tensor | int]:
    """A wall seen by cameras side by side."""
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(samples, views, 1, 1)
    extrinsics[:, :, 0, 3] = -0.25 * torch.arange(views)
    intrinsics = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]], dtype=torch.float64)
    return {
        "images": torch.rand(samples, views, 3, size, size, generator=torch.Generator().manual_seed(0)).double(),
        "intrinsics": intrinsics.expand(samples, views, 3, 3).clone(),
        "extrinsics": extrinsics,
        "depth": torch.full((samples, views, 1, size, size), 2.0, dtype=torch.float64),
        "num_reference_views": 1,
    }


def loss_and_gradient(device: str, dtype: torch.dtype, use_xformers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Alignment loss of the tiny cat3d model and its gradient at the first convolution."""
    torch.manual_seed(0)
    pipeline = get_backbone("cat3d").build("tiny")
    if use_xformers:
        pipeline.enable_xformers_memory_efficient_attention()
    model = cameo.wrap(pipeline.denoiser, backbone="cat3d").to(device=device)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    data = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch().items()}
    reference = next(model.parameters())
    data = {k: v.to(reference) if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    steps = torch.tensor([500, 900])
    inputs = pipeline.training_inputs(data, generator=torch.Generator().manual_seed(0), timesteps=steps)
    match = cameo.Correspondence.from_depth(
        data["depth"], data["intrinsics"], data["extrinsics"], token_grid=model.token_grid(64, 64)
    )
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(torch.device(device).type, dtype=dtype if half else None, enabled=half):
        model(*inputs.args, correspondence=match, **inputs.kwargs)
    model.alignment_loss.backward()
    return model.alignment_loss.detach().double().cpu(), model.base_model.conv_in.weight.grad.double().cpu()


def fused_loss(device: str, dtype: torch.dtype, implementation: str, **head: Any) -> list[torch.Tensor]:
    """Alignment loss of random queries and keys, and its gradients, for one kind of head; rows of 12 x 20 tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 10, 3, 240, 64, generator=generator).to(dtype) for _ in range(2))
    index = torch.randint(0, 240, (2, 3, 3, 240), generator=generator)
    index[torch.rand(index.shape, generator=generator) > 0.6] = -1
    index[:, range(3), range(3)] = -1
    torch.manual_seed(0)
    joined = cameo.AlignmentHead(10, **head)
    if implementation == "reference":
        query, key, joined = query.double(), key.double(), joined.double()
    query, key, joined = query.to(device).requires_grad_(), key.to(device).requires_grad_(), joined.to(device)
    match = cameo.Correspondence(index.to(device), ((12, 20),) * 3)
    loss = cameo.alignment_loss(query, key, match, joined, implementation=implementation)
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    gradients = torch.autograd.grad(scale * loss, [query, key, *joined.parameters()])
    return [loss.detach().double().cpu(), *(gradient.double().cpu() / scale for gradient in gradients)]


def fused_rows(device: str) -> list[tuple[str, float, float]]:
    """Largest error of the fused loss and its gradients, and whether two runs give the same bits."""
    rows = []
    for head in ({"depth": 1}, {"depth": 0}, {"kind": "mean"}, {"kind": "none"}):
        for dtype, tolerance in FUSED_TOLERANCE.items():
            expected = fused_loss("cpu", dtype, "reference", **head)
            first, second = (fused_loss(device, dtype, "auto", **head) for _ in range(2))
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(first, expected, strict=True))
            rows.append((f"fused loss and gradients, {head}, {dtype}", error, tolerance))
            moved = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
            rows.append((f"the same, difference between two runs, {head}, {dtype}", moved, 0.0))
    return rows


def matches(device: str) -> torch.Tensor:
    """Index of the correspondence of the wall, from its depth and from its points."""
    data = {k: v.to(device) for k, v in batch().items() if isinstance(v, torch.Tensor)}
    cameras = data["depth"], data["intrinsics"], data["extrinsics"]
    points = unproject(*cameras) + 1e-3 * data["images"]  # no two points alike
    found = (
        cameo.Correspondence.from_depth(*cameras, token_grid=32),
        cameo.Correspondence.from_point_maps(points, token_grid=32),
    )
    return torch.stack([one.index.cpu() for one in found])


def main(arguments: list[str]) -> int:
    """Run all comparisons and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    # By default cuDNN multiplies float32 in TF32: then the gradient is 1e-3 off, with CAMEO or without.
    torch.backends.cudnn.allow_tf32 = False
    true_loss, true_gradient = loss_and_gradient("cpu", torch.float64)
    rows: list[tuple[str, float, float]] = []

    def compare(name: str, run: Callable[[], tuple[torch.Tensor, torch.Tensor]], tolerance: float) -> None:
        loss, gradient = run()
        rows.append((f"{name}, loss", float((loss - true_loss).abs() / true_loss), tolerance))
        rows.append((f"{name}, gradient", float((gradient - true_gradient).norm() / true_gradient.norm()), tolerance))

    for dtype, tolerance in TOLERANCE.items():
        compare(str(dtype), lambda dtype=dtype: loss_and_gradient(device, dtype), tolerance)
    if importlib.util.find_spec("xformers") and torch.device(device).type == "cuda":
        compare("xformers, float16", lambda: loss_and_gradient(device, torch.float16, True), TOLERANCE[torch.float16])
    rows.append(
        ("correspondence, share of other matches", float((matches(device) != matches("cpu")).double().mean()), 0.0)
    )
    rows += fused_rows(device)
    first, second = (loss_and_gradient(device, torch.float32)[0] for _ in range(2))
    rows.append(("difference of the loss between two runs", float((first - second).abs()), 0.0))
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device
    print(f"device: {name}, torch {torch.__version__}\n")
    print(markdown_table(["check", "relative error", "allowed"], []))
    for title, error, tolerance in rows:
        shown = markdown_row([title, f"{error:.2e}", f"{tolerance:.0e}"])
        print(f"{shown}{'' if error <= tolerance else ' FAILED'}")
    return int(any(error > tolerance for _, error, tolerance in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
