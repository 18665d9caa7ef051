"""Report of any set of runs: one HTML page that needs no network, with the figures and tables beside it."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from supsup_lightning import __version__
from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.files import replacing
from supsup_lightning.report import arrangement, curves, drawing, run_figures, tables
from supsup_lightning.report.collection import Run, collect, without_duplicates
from supsup_lightning.report.comparison import MAIN, METRICS, Comparison, compare, label, short
from supsup_lightning.report.findings import findings, pareto_front

_MOST_DETAILED = 12  # runs whose own figures are drawn
_COSTS = ("train_seconds", "inference_ms_per_batch", "peak_memory_bytes")


@dataclass(frozen=True)
class Picture:
    """Figure on the page."""

    name: str
    caption: str
    svg: Markup
    wide: bool


@dataclass
class Report:
    """Contents of a page.

    Attributes:
        comparison: finished runs side by side.
        unfinished: runs without results.
        folder: where the page and the files beside it are.
        pictures: figures that compare runs.
        details: figures of single runs, by the name of the run.
        notes: what a reader has to know of the numbers.
    """

    comparison: Comparison
    unfinished: list[Run]
    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    details: dict[str, list[Picture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """Path of the page."""
        return self.folder / "report.html"


def write(
    folders: Sequence[Path],
    out: Path,
    *,
    x: str | None = None,
    y: str = "average_accuracy",
    group: Sequence[str] = (),
    title: str = "",
) -> Report:
    """Write report.html, table.csv, table.md, table.tex, runs.csv and figures/.

    Args:
        folders: output directories of runs or sweeps; runs are searched in all folders below.
        out: folder for the report.
        x: option on the x axis; by default one figure per varied option that is a number.
        y: metric on the y axis.
        group: options that tell lines apart; by default all varied options but the one on the x axis.
        title: title of the page; by default the folders.

    Raises:
        DataError: a folder does not exist, or no run in it is finished.
        ConfigurationError: an option or a metric that these runs do not have.
    """
    runs, repeated = without_duplicates(collect(folders))
    finished = [run for run in runs if run.finished]
    if not finished:
        states = "; ".join(f"{run.folder.name}: {run.state}, {run.error}" for run in runs[:3])
        raise DataError(f"None of the {len(runs)} runs is finished ({states}).")
    comparison = compare(finished)
    _check(comparison, x=x, y=y, group=group)
    report = Report(comparison, [run for run in runs if not run.finished], out, notes=_notes(comparison, repeated))
    with drawing.style():
        for name, caption, figure in _comparing(comparison, x=x, y=y, group=group, notes=report.notes):
            report.pictures.append(_picture(figure, name, caption, out / "figures"))
        for run in _detailed(comparison, report.notes):
            name = _run_name(comparison, run)
            prefix = f"run_{comparison.runs.index(run) + 1}"
            report.details[name] = [
                _picture(figure, f"{prefix}_{kind}", caption, out / "figures")
                for kind, caption, figure in run_figures.figures(run)
            ]
    _remove_older(out, [*report.pictures, *(picture for own in report.details.values() for picture in own)])
    tables.write(comparison, out)
    _write_page(report, title=title or ", ".join(map(str, folders)), folders=folders, y=y)
    return report


def _check(comparison: Comparison, *, x: str | None, y: str, group: Sequence[str]) -> None:
    if y not in comparison.metrics:
        raise ConfigurationError(f"--y {y}: these runs have no such number. They have {', '.join(comparison.metrics)}.")
    for name, option in [(x, "--x"), *((name, "--group") for name in group)]:
        if name is not None:
            comparison.check_varied(name, option=option)
    if x is not None and not comparison.is_numeric(x):
        raise ConfigurationError(f"--x {x}: its values are not all numbers; use it as --group.")
    if x in group:
        raise ConfigurationError(f"--x and --group are both {x}; leave it out of one.")


def _comparing(comparison: Comparison, *, x: str | None, y: str, group: Sequence[str], notes: list[str]) -> Any:
    """Yield name, caption and figure of each comparison."""
    groups, varied = comparison.groups, comparison.varied
    spread = _spread(comparison)
    for option in [x] if x else [name for name in varied if comparison.is_numeric(name)]:
        others = [name for name in varied if name != option]
        arranged = arrangement.arrange(groups, others, by=[name for name in group if name != option])
        metrics = dict.fromkeys([y, *(["task_inference_accuracy"] if y == "average_accuracy" else [])])
        for metric in metrics:
            if metric in comparison.metrics:
                caption = f"{METRICS[metric].capitalize()} against {option}. {spread}. {arranged.note}"
                name = f"{metric}_by_{_file(option)}"
                yield name, caption, curves.against_option(arranged, x=option, y=metric)
    labels = [label({name: row[(name, "")] for name in varied}, varied) for _, row in groups.iterrows()]
    if len(groups) > 1:
        shares = [name for name in (y, *MAIN[:2]) if name in comparison.metrics]
        if not any(comparison.is_numeric(name) for name in varied):
            yield (
                "by_group",
                f"Every group of runs. {spread}.",
                curves.by_group(groups, labels, [*dict.fromkeys(shares)]),
            )
    if len(groups) > 1 and "model_bytes" in comparison.metrics:
        front = pareto_front(groups, x="model_bytes", y=y)
        figure = curves.against_bytes(groups, labels, x="model_bytes", y=y, front=front)
        caption = (
            f"{METRICS[y].capitalize()} against the size of the file that holds all tasks. Filled markers: no other "
            f"group is at least as good in both (Pareto front). {spread}."
        )
        yield "against_bytes", caption, figure
    arranged = arrangement.arrange(groups, varied, by=group if not x else [x, *group] if group else ())
    after = {place: curve for place, run in enumerate(comparison.runs) if (curve := _after(run)) is not None}
    if after:
        caption = f"Accuracy on all tasks learned so far. {spread}. {arranged.note}"
        yield "after_tasks", caption, curves.after_tasks(arranged, after)
    by_layer = {
        place: table
        for place, run in enumerate(comparison.runs)
        if (table := run_figures.read(run.folder / "layers.csv")) is not None
    }
    networks: dict[tuple[str, ...], dict[int, pd.DataFrame]] = {}
    for place, table in by_layer.items():
        networks.setdefault(tuple(table["layer"]), {})[place] = table
    for number, own in enumerate(networks.values(), start=1):
        of_network = groups[[any(member in own for member in members) for members in groups[("members", "")]]]
        arranged = arrangement.arrange(of_network, varied, by=group)
        suffix = f"_{number}" if len(networks) > 1 else ""
        caption = f"Share of each layer's weights that a mask switches on. {spread}. {arranged.note}"
        yield f"density_by_layer{suffix}", caption, curves.layers(arranged, own, column="density")
        if any(table["overlap"].notna().any() for table in own.values()):
            caption = (
                "Share of a mask's weights that another mask has on as well, over all pairs of masks. Open markers: "
                f"masks that are independent of one another. {spread}. {arranged.note}"
            )
            yield f"overlap_by_layer{suffix}", caption, curves.layers(arranged, own, column="overlap")
    costs = [name for name in _COSTS if name in comparison.metrics]
    if not costs:
        return
    caption = f"Time and memory. They depend on the machine, and on what else ran on it. {spread}."
    yield "costs", caption, curves.by_group(groups, labels, costs)


def _after(run: Run) -> pd.Series | None:
    return run_figures.accuracy_after_tasks(run.folder)


def _spread(comparison: Comparison) -> str:
    numbers = sorted({int(number) for number in comparison.groups[("runs", "")]})
    if numbers == [1]:
        return "One run each"
    seeds = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"Mean and standard deviation over {seeds} seeds"


def _detailed(comparison: Comparison, notes: list[str]) -> list[Run]:
    """One run of each group, the first by seed, as long as there are not too many."""
    chosen = [comparison.runs[members[0]] for members in comparison.groups[("members", "")]]
    if len(chosen) > _MOST_DETAILED:
        places = np.linspace(0, len(chosen) - 1, _MOST_DETAILED).round().astype(int)
        notes.append(f"Figures of single runs are drawn for {_MOST_DETAILED} of {len(chosen)} groups.")
        chosen = [chosen[place] for place in places]
    return chosen


def _notes(comparison: Comparison, repeated: Sequence[Run]) -> list[str]:
    notes = []
    if repeated:
        notes.append(
            f"{len(repeated)} older runs repeat a configuration, data and seed of another run; the newer ones count: "
            + ", ".join(str(run.folder) for run in repeated[:3])
        )
    outdated = [run for run in comparison.runs if run.error]
    if outdated:
        notes.append(
            f"{len(outdated)} results are of an earlier job: the last one in their directory ended with an error "
            f"({outdated[0].folder.name}: {outdated[0].error})"
        )
    partial = [run for run in comparison.runs if any(name.startswith("limit_") for name in run.result)]
    if partial:
        notes.append(f"{len(partial)} runs trained or tested on a part of the data (trainer.limit_…).")
    unrecorded = [run for run in comparison.runs if not run.is_recorded]
    if unrecorded:
        notes.append(
            f"Options of {len(unrecorded)} runs are not known, as they have no run.json ({unrecorded[0].folder.name}): "
            "those alike in scenario, data, network and method are averaged."
        )
    groups = comparison.groups
    repeats = int((groups[("runs", "")] > groups[("seeds", "")]).sum())
    if repeats:
        notes.append(f"{repeats} rows of the table average several runs of the same seed (runs.csv has each of them).")
    versions = {str((run.result.get("versions") or {}).get("supsup-lightning")) for run in comparison.runs}
    if len(versions) > 1:
        notes.append(f"The runs are of different versions of this package: {', '.join(sorted(versions))}.")
    shards = {run.result["task_shard"] for run in comparison.runs if "task_shard" in run.result}
    if shards:
        notes.append(
            f"Runs of a shard of the tasks (data.task_shard={', '.join(sorted(shards))}) tested its tasks alone; their "
            "numbers are not those of all tasks."
        )
    if len({run.result.get("num_tasks") for run in comparison.runs}) > 1:
        notes.append("The runs have different numbers of tasks; average accuracies are over different tasks.")
    return notes


def _picture(figure: Figure, name: str, caption: str, folder: Path) -> Picture:
    with drawing.style(name):
        drawing.save(figure, folder / f"{name}.png")
        path = drawing.save(figure, folder / f"{name}.svg")
    text = path.read_text()
    svg = text[text.index("<svg") :]
    # Names such as axes_1 are the same in all of matplotlib's files, and have to be unique on the page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    described = f'<svg role="img" aria-label="{name.replace("_", " ")}"'
    wide = figure.get_figwidth() > 0.9 * drawing.WIDE
    return Picture(name, " ".join(caption.split()), Markup(svg.replace("<svg", described, 1)), wide)


def _run_name(comparison: Comparison, run: Run) -> str:
    values = {name: run.options.get(name) for name in comparison.varied}
    return f"{label(values, comparison.varied)}, seed {run.seed}"


def _file(option: str) -> str:
    return re.sub(r"\W+", "_", option)


def _remove_older(out: Path, pictures: Sequence[Picture]) -> None:
    """Remove figures of an earlier report in the same folder that this one does not have."""
    if not (out / "report.html").exists():
        return
    names = {picture.name for picture in pictures}
    for path in (out / "figures").glob("*"):
        if path.suffix in (".svg", ".png") and path.stem not in names:
            path.unlink()


def _write_page(report: Report, *, title: str, folders: Sequence[Path], y: str) -> None:
    environment = Environment(loader=PackageLoader("supsup_lightning.report"), autoescape=True, trim_blocks=True)
    comparison = report.comparison
    words = tables.in_words(comparison, metrics=comparison.metrics)
    sortable = [
        [*(row[(name, "")] for name in comparison.varied), row[("seeds", "")]]
        + [row[(metric, "mean")] for metric in comparison.metrics]
        for _, row in comparison.groups.iterrows()
    ]
    text = environment.get_template("page.html").render(
        title=title,
        report=report,
        findings=findings(comparison, y=y),
        columns=[*words.columns],
        rows=[
            [*zip(cells, keys, strict=True)]
            for cells, keys in zip(words.itertuples(index=False), sortable, strict=True)
        ],
        num_options=len(comparison.varied),
        num_runs=len(comparison.runs),
        common=_common(comparison.runs),
        command=shlex.join(["supsup", "report", *map(str, folders)]),
        version=__version__,
        short=short,
    )
    with replacing(report.path) as temporary:
        temporary.write_text(text)


def _common(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs have in common, of what describes a run."""
    names = ("scenario", "data", "network", "method", "optimizer", "inference", "data.num_tasks", "data.steps_per_task")
    values = {name: {str(run.options.get(name)) for run in runs} for name in (*names, "seed")}
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    common = {name: next(iter(found)) for name, found in values.items() if len(found) == 1 and found != {"None"}}
    return {**common, **({"seeds": ", ".join(map(str, seeds))} if len(seeds) > 1 else {})}
