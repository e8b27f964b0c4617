"""The whole campaign, one part after the other: about half an hour on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability [--seed 0]

Each part is a command of its own, with its table in `benchmarks/reliability/README.md`, or in `machines.md` beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

PARTS = ("kills", "folders", "bad_input")


def main() -> int:
    """Run every part; returns how many ended with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    commands = [[sys.executable, "-m", f"benchmarks.reliability.{part}", "--seed", str(seed)] for part in PARTS]
    commands.append([sys.executable, "-m", "benchmarks.reliability.machines"])  # in which nothing is drawn
    return sum(subprocess.run(command).returncode != 0 for command in commands)


if __name__ == "__main__":
    raise SystemExit(main())
