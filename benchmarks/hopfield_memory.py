"""How many random patterns does a Hopfield memory hold, and how long do storing and recovery take? (docs/hopfield.md)

    python benchmarks/hopfield_memory.py --out docs/hopfield_capacity.png [--units 128 256 512 1024 2048]

For each number of units and both rules: stores random patterns one after another, and now and then recovers some of
them by gradient descent on the energy alone, from copies in which a tenth of the units is flipped. The capacity is the
largest number of stored patterns of which at least half come back without an error. Prints it beside theory, and the
seconds that storing and recovering one pattern take, beside one multiplication of the matrix with a vector.
"""

import argparse
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from supsup_lightning.bank.hopfield_memory import RULES, HopfieldMemory, capacity, overlap, recover, signs

FLIPPED = 0.1
ASKED = 50  # patterns, at most, that are recovered at each number of stored ones
COLOURS = {"storkey": "tab:blue", "hebbian": "tab:orange"}


def measure(units: int, rule: str) -> list[tuple[int, float, float]]:
    """Rows of (patterns stored, share recovered without an error, mean overlap with what was stored)."""
    draw = torch.Generator().manual_seed(units)
    memory, patterns, rows = HopfieldMemory([units], rule=rule), [], []
    every = max(1, round(capacity(units, rule) / 12))
    while not rows or (rows[-1][1] > 0.02 and len(patterns) < 1.1 * units):
        for _ in range(every):
            patterns.append(signs(torch.randn(units, generator=draw)))
            memory.store(patterns[-1])
        chosen = torch.stack(patterns)[torch.randperm(len(patterns), generator=draw)[:ASKED]]
        flips = torch.rand(chosen.shape, generator=draw) < FLIPPED
        found = recover(memory, start=torch.where(flips, -chosen, chosen)).state
        exact = (found == chosen).all(1).double().mean().item()
        rows.append((len(patterns), exact, overlap(found, chosen).diagonal().mean().item()))
    return rows


def held(rows: list[tuple[int, float, float]]) -> int:
    """The largest number of patterns up to which at least half were recovered each time."""
    number = 0
    for stored, exact, _ in rows:
        if exact < 0.5:
            break
        number = stored
    return number


def seconds(call, repeats: int) -> float:
    call()
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats


def print_times(units: int) -> None:
    memory = HopfieldMemory([units])
    pattern = signs(torch.randn(units))
    for _ in range(5):
        memory.store(signs(torch.randn(units)))
    memory.store(pattern)
    start = pattern * signs(torch.rand(units) - FLIPPED)
    copy = HopfieldMemory([units])
    product = seconds(lambda: memory.field(pattern), 50)
    store = seconds(lambda: copy.store(pattern), 10)
    recovery = seconds(lambda: recover(memory, start=start), 10)
    steps = len(recover(memory, start=start).loss)
    print(f"d = {units}: matrix times vector {1000 * product:.2f} ms; store {1000 * store:.1f} ms,", end=" ")
    print(
        f"{store / product:.0f} times that; recover {1000 * recovery:.1f} ms in {steps} steps without a loss,", end=" "
    )
    print(f"{recovery / product:.0f} times that")


def draw(results: dict[tuple[str, int], list[tuple[int, float, float]]], path: Path) -> None:
    figure = Figure(figsize=(12, 4))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    exact, overlaps, capacities = figure.subplots(1, 3)
    units = sorted({size for _, size in results})
    for (rule, size), rows in results.items():
        stored, shares, means = np.array(rows).T
        shade = 0.25 + 0.75 * (units.index(size) + 1) / len(units)
        for axes, values in ((exact, shares), (overlaps, means)):
            label = f"{rule}, d = {size}" if size in (units[0], units[-1]) else None
            axes.plot(stored / size, values, color=COLOURS[rule], alpha=shade, label=label)
    for axes, label in ((exact, "share recovered without an error"), (overlaps, "mean overlap with the pattern")):
        axes.set_xlabel("patterns stored / d")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    exact.legend(fontsize=8)
    fine = np.geomspace(units[0], units[-1], 100)
    for rule, formula in (("storkey", "d / sqrt(2 ln d)"), ("hebbian", "d / (2 ln d)")):
        measured = [held(results[rule, size]) for size in units]
        capacities.plot(units, measured, "o", color=COLOURS[rule], label=f"{rule}, measured")
        capacities.plot(
            fine, [capacity(d, rule) for d in fine], color=COLOURS[rule], label=f"{rule}, theory: {formula}"
        )
    capacities.plot(fine, 0.138 * fine, "--", color="0.5", label="hebbian with errors allowed: 0.138 d")
    capacities.set_xscale("log", base=2)
    capacities.set_yscale("log", base=2)
    capacities.set_xlabel("units d")
    capacities.set_ylabel("patterns held")
    capacities.grid(alpha=0.3)
    capacities.set_xticks(units, units)
    capacities.yaxis.set_major_formatter("{x:.0f}")
    capacities.set_ylim(top=4 * capacity(units[-1], "storkey"))
    capacities.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--units", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    options = parser.parse_args()
    print_times(max(options.units))
    print("| units | rule | patterns held | theory |")
    print("|---|---|---|---|")
    results = {}
    for units in options.units:
        for rule in RULES:
            results[rule, units] = measure(units, rule)
            print(f"| {units} | {rule} | {held(results[rule, units])} | {capacity(units, rule):.0f} |", flush=True)
    draw(results, options.out)


if __name__ == "__main__":
    main()
