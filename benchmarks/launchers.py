"""Time of a sweep whose jobs run at once (launcher=joblib), relative to jobs one after another.

python benchmarks/launchers.py --rounds 3

Each round runs the same sweep of four jobs in each way, in alternating order, in a temporary folder. Jobs that run one
after another have one thread, or all threads of the machine.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).parent.parent
SWEEP = ["-m", "data.num_tasks=10", "data.steps_per_task=400", "seed=0,1,2,3", "logger=none", "~callbacks.progress"]
WAYS = {
    "one after another, one thread": ([], {"OMP_NUM_THREADS": "1"}),
    "one after another, all threads": ([], {}),
    "launcher=joblib": (["launcher=joblib"], {}),
}


def seconds(way: str, overrides: list[str]) -> float:
    """Time of one sweep in seconds."""
    options, variables = WAYS[way]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *SWEEP, *overrides, *options]
        started = perf_counter()
        subprocess.run(command, cwd=folder, env={**environment, **variables}, check=True, capture_output=True)
        return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="more overrides, such as data=permuted_mnist")
    options = parser.parse_args()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in [*WAYS][:: 1 if number % 2 == 0 else -1]:
            times[way].append(seconds(way, options.overrides))
            print(f"round {number + 1}: {way}: {times[way][-1]:.1f} s", flush=True)
    base = times["one after another, one thread"]
    for way, own in times.items():
        ratios = [mine / other for mine, other in zip(own, base, strict=True)]
        print(f"{way}: median {statistics.median(own):.1f} s, ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
