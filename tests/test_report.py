"""Reports: what differs between runs, means over seeds, the page and the tables."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from supsup_lightning import bits
from supsup_lightning.bank.layer_statistics import layer_statistics
from supsup_lightning.bank.mask_bank import MaskBank
from supsup_lightning.cli.app import app
from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.layout import Layout
from supsup_lightning.report import page, plots, tables
from supsup_lightning.report.collection import collect, read, without_duplicates
from supsup_lightning.report.comparison import compare
from supsup_lightning.report.findings import pareto_front


def write_run(folder: Path, accuracy: float, *, overrides: dict, options: dict | None = None, **result) -> Path:
    """Write the files of a finished run, as a run writes them."""
    folder.mkdir(parents=True)
    every = {"seed": 0, "network.output_size": 100, "mask.sparsity": None, "data.steps_per_task": 1000}
    every |= {name: value for name, value in overrides.items() if "." in name or name == "seed"} | (options or {})
    every |= {"data.seed": every["seed"], "schedule.warmup_steps": 0}
    choices = {"scenario": "gnu", "data": "permuted_digits", "network": "lenet", "method": "supsup"}
    choices |= {name: value for name, value in overrides.items() if name in choices}
    digest = (result.get("identity") or {}).get("digest") or str(hash(json.dumps([every, choices])))
    (folder / "run.json").write_text(json.dumps({"digest": digest, "options": every, "choices": choices}))
    record = {
        "status": "finished",
        "overrides": [f"{name}={value}" for name, value in overrides.items()],
        "started": "2026-01-01T00:00:00.000000+00:00",
    }
    (folder / "job.json").write_text(json.dumps(record))
    values = {
        **choices,
        **{"seed": every["seed"], "num_tasks": 3, "average_accuracy": accuracy, "task_inference_accuracy": 0.5},
        **{"model_bytes": 1000, "train_seconds": 1.0, "peak_memory_bytes": 2**20, "inference_ms_per_batch": 2.0},
        "identity": {"digest": digest, "files": None},
        **result,
    }
    (folder / "results.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def sweep(tmp_path):
    """A sweep over output size and objective with two seeds, of which one job failed."""
    for size in (25, 100, 400):
        for objective in ("entropy", "superfluous"):
            for seed in (0, 1):
                accuracy = 0.9 + 0.01 * math.log(size) - 0.02 * (objective == "entropy") + 0.004 * seed
                overrides = {"network.output_size": size, "inference.objective": objective, "seed": seed}
                folder = tmp_path / f"{size}-{objective}-{seed}"
                write_run(folder, accuracy, overrides=overrides, model_bytes=10 * size)
    failed = tmp_path / "failed"
    failed.mkdir()
    record = {"status": "failed", "overrides": ["seed=2"], "started": "2026-01-01T00:00:00+00:00"}
    (failed / "job.json").write_text(json.dumps({**record, "error": "Traceback\nValueError: no such thing"}))
    return tmp_path


def test_varied_options_are_found_and_seeds_averaged(sweep):
    runs = collect([sweep])
    comparison = compare([run for run in runs if run.finished])
    assert comparison.varied == ("inference.objective", "network.output_size")
    groups = comparison.groups
    assert groups[("network.output_size", "")].tolist() == [25, 100, 400] * 2
    row = groups[(groups[("inference.objective", "")] == "entropy") & (groups[("network.output_size", "")] == 25)].iloc[
        0
    ]
    values = [0.9 + 0.01 * math.log(25) - 0.02, 0.9 + 0.01 * math.log(25) - 0.016]
    assert row[("average_accuracy", "mean")] == pytest.approx(np.mean(values))
    assert row[("average_accuracy", "std")] == pytest.approx(np.std(values, ddof=1))
    assert row[("seeds", "")] == 2
    (failed,) = [run for run in runs if not run.finished]
    assert (failed.state, failed.error) == ("failed", "ValueError: no such thing")


def test_runs_that_differ_in_what_was_not_typed_are_no_repetitions(tmp_path):
    write_run(tmp_path / "a", 0.9, overrides={"seed": 0}, options={"data.steps_per_task": 500})
    write_run(tmp_path / "b", 0.8, overrides={"seed": 1})
    comparison = compare(collect([tmp_path]))
    assert comparison.varied == ("data.steps_per_task",)
    assert comparison.groups[("seeds", "")].tolist() == [1, 1]


def test_runs_on_other_files_are_no_repetitions(tmp_path):
    for seed, digest in ((0, "x"), (1, "x"), (2, "y")):
        files = {"root": "images", "sources": [{"source": "ImageFolder", "digest": digest}]}
        identity = {"digest": f"{digest}{seed}", "files": files}
        write_run(tmp_path / f"{digest}{seed}", 0.9, overrides={"seed": seed}, identity=identity)
    comparison = compare(collect([tmp_path]))
    assert comparison.varied == ("data files",)
    assert comparison.groups[("seeds", "")].tolist() == [2, 1]


def test_seeds_alone_make_one_group_even_where_another_option_has_the_same_value(tmp_path):
    for seed in (0, 1):  # schedule.warmup_steps=0 equals the first seed, data.seed follows both
        write_run(tmp_path / str(seed), 0.9 + seed / 100, overrides={"seed": seed})
    comparison = compare(collect([tmp_path]))
    assert comparison.varied == ()
    assert len(comparison.groups) == 1
    assert {picture.name for picture in page.write([tmp_path], tmp_path / "report").pictures} == {"costs"}
    assert comparison.groups[("average_accuracy", "mean")].item() == pytest.approx(0.905)


def test_choices_that_follow_from_another_are_left_out(tmp_path):
    for method, network in (("hopfield", "hop_net"), ("supsup", "lenet")):
        folder = write_run(tmp_path / method, 0.9, overrides={"method": method}, network=network)
        text = (folder / "run.json").read_text()
        (folder / "run.json").write_text(text.replace('"network": "lenet"', f'"network": "{network}"'))
    assert compare(collect([tmp_path])).varied == ("method",)


def test_the_same_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", 0.9, overrides={"seed": 0})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    kept, repeated = without_duplicates(collect([tmp_path, tmp_path / "a"]))
    assert (len(kept), len(repeated)) == (1, 1)


def test_methods_of_different_kinds_are_compared_by_their_choice(tmp_path):
    write_run(tmp_path / "a", 0.9, overrides={"method": "supsup"})
    write_run(tmp_path / "b", 0.8, overrides={"method": "psp"})
    write_run(tmp_path / "c", 0.7, overrides={})
    comparison = compare(collect([tmp_path]))
    assert comparison.varied == ("method",)
    assert comparison.groups[("method", "")].tolist() == ["supsup", "psp"]  # the default is supsup as well


def test_damaged_and_missing_results_are_named(tmp_path):
    folder = write_run(tmp_path / "a", 0.9, overrides={})
    (folder / "results.json").write_text('{"average_accuracy": 0.9, ')
    run = read(folder)
    assert not run.finished
    assert "results.json is damaged" in run.error
    with pytest.raises(DataError, match="no folder"):
        collect([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no run in there"):
        collect([tmp_path / "empty"])
    with pytest.raises(DataError, match="None of the 1 runs is finished"):
        page.write([tmp_path], tmp_path / "report")


def test_numbers_that_some_runs_lack_and_results_of_an_earlier_job_are_told(tmp_path):
    write_run(tmp_path / "a", 0.9, overrides={"seed": 0}, validation_accuracy=0.95)
    folder = write_run(tmp_path / "b", 0.8, overrides={"seed": 1})
    record = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**record, "status": "failed", "error": "no space left"}))
    (tmp_path / "again").symlink_to(tmp_path)
    written = page.write([tmp_path], tmp_path / "report")
    (words,) = tables.in_words(written.comparison, metrics=["average_accuracy", "validation_accuracy"]).to_dict(
        "records"
    )
    assert words["accuracy"] == "0.8500 ± 0.0707"
    assert words["validation accuracy"] == "0.9500 (of 1)"
    assert [note for note in written.notes if "an earlier job" in note and "no space left" in note]


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("mask.flag", True, 1),
        ("mask.sparsity", None, "null"),
        ("mask.sparsity", 0.5, "0.5"),
        ("mask.include", [1, 2], "[1, 2]"),
        ("optimizer.lr", 0.0012345678, 0.0012345679),
        ("optimizer._target_", "torch.optim.SGD", "torch.optim.Adam"),
        ("callbacks.mine.average", True, False),
        ("mask.note", "a$x^{$<b>", "[/red]"),
    ],
)
def test_different_values_make_different_groups_with_different_names(name, one, other, tmp_path):
    for seed, value in enumerate((one, other)):
        write_run(tmp_path / str(seed), 0.9 - seed / 10, overrides={"seed": seed, name: value})
    written = page.write([tmp_path], tmp_path / "report")
    assert written.comparison.varied == (name,)
    assert len({*tables.in_words(written.comparison)[name]}) == 2
    assert written.comparison.groups[("seeds", "")].tolist() == [1, 1]
    assert "<b>" not in written.path.read_text()


def test_equal_numbers_are_one_group_and_numbers_are_sorted_before_words(tmp_path):
    for seed, value in enumerate((1, 1.0, 100, None, 25)):
        write_run(tmp_path / str(seed), 0.9, overrides={"seed": seed, "data.patience": value})
    assert tables.in_words(compare(collect([tmp_path])))["data.patience"].tolist() == ["1", "25", "100", "null"]


def test_values_that_nobody_typed_are_not_taken_for_seeds_nor_absent_ones_for_null(tmp_path):
    for seed, options in enumerate(({"x.flag": False, "x.new": None}, {"x.flag": True})):
        write_run(tmp_path / str(seed), 0.9, overrides={"seed": seed}, options=options)
    assert compare(collect([tmp_path])).varied == ("x.flag", "x.new")


def test_runs_of_one_seed_and_runs_without_a_configuration_are_told(tmp_path):
    for place, seed in enumerate((0, 0, 1)):
        folder = write_run(tmp_path / str(place), 0.9, overrides={"seed": seed}, identity=None)
        (folder / "run.json").unlink()
    notes = page.write([tmp_path], tmp_path / "report").notes
    assert [note for note in notes if "several runs of the same seed" in note]
    assert [note for note in notes if "Options of 3 runs are not known" in note]


def test_numbers_that_whole_groups_lack_are_left_out(tmp_path):
    costs = dict.fromkeys(("model_bytes", "train_seconds", "peak_memory_bytes", "inference_ms_per_batch"))
    for place, found in enumerate((0.5, None)):
        overrides = {"network.output_size": 10 * place + 10}
        write_run(tmp_path / str(place), 0.9, overrides=overrides, **costs, task_inference_accuracy=found)
    for y in ("average_accuracy", "task_inference_accuracy"):
        names = {picture.name for picture in page.write([tmp_path], tmp_path / "report", y=y).pictures}
        assert names == {f"{name}_by_network_output_size" for name in (y, "task_inference_accuracy")}


def test_results_of_another_run_than_run_json_do_not_count(tmp_path):
    folder = write_run(tmp_path / "a", 0.9, overrides={"seed": 0})
    stored = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**stored, "digest": "another"}))
    run = read(folder)
    assert not run.finished
    assert "different runs" in run.error


def test_folders_of_data_without_known_files_are_told_apart(tmp_path):
    for seed, root in enumerate(("here", "there")):
        write_run(tmp_path / root, 0.9, overrides={"seed": seed, "data.root": root})
    assert compare(collect([tmp_path])).varied == ("data.root",)


def test_the_page_has_its_figures_and_tables(sweep):
    written = page.write([sweep], sweep / "report")
    names = {picture.name for picture in written.pictures}
    assert names == {
        *("average_accuracy_by_network_output_size", "task_inference_accuracy_by_network_output_size"),
        *("against_bytes", "costs"),
    }
    for name in names:
        assert (sweep / "report" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (sweep / "report" / "figures" / f"{name}.svg").read_text()
    text = written.path.read_text()
    assert "ValueError: no such thing" in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").split("<style>")[0]
    for address in ("src=", "@import", "<link rel=stylesheet"):
        assert address not in text  # nothing is loaded
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    table = pd.read_csv(sweep / "report" / "table.csv")
    assert len(table) == 6
    assert "±" in (sweep / "report" / "table.md").read_text()
    latex = (sweep / "report" / "table.tex").read_text()
    assert r"\toprule" in latex
    assert r"$\pm$" in latex
    assert len(pd.read_csv(sweep / "report" / "runs.csv")) == 12
    # Another report in the same folder leaves no figure of this one, and does not count the report as a run.
    again = page.write([sweep], sweep / "report", x="network.output_size", group=["inference.objective"])
    assert len(again.comparison.runs) == 12


def test_axes_that_the_runs_do_not_have_are_refused(sweep):
    with pytest.raises(ConfigurationError, match=r"--x network.output_siz: .* Did you mean network.output_size"):
        page.write([sweep], sweep / "report", x="network.output_siz")
    with pytest.raises(ConfigurationError, match="not all numbers"):
        page.write([sweep], sweep / "report", x="inference.objective")
    with pytest.raises(ConfigurationError, match="--y accuracy"):
        page.write([sweep], sweep / "report", y="accuracy")
    assert not (sweep / "report").exists()


def test_pareto_front():
    groups = pd.DataFrame({("bytes", "mean"): [10, 20, 20, 30, 5], ("accuracy", "mean"): [0.8, 0.9, 0.95, 0.9, 0.8]})
    assert pareto_front(groups, x="bytes", y="accuracy") == [4, 2]


def test_layer_statistics_agree_with_loops_over_masks():
    layout = Layout(("a", "b"), ((4, 5), (3, 3)))
    masks = torch.rand(5, layout.num_weights, generator=torch.Generator().manual_seed(0)) < 0.3
    bank = MaskBank(layout.num_weights)
    for task, mask in enumerate(masks):
        bank.add(task, mask)
    assert torch.equal(bits.unpack(bank.packed, layout.num_weights), masks)
    for found, part in zip(layer_statistics(bank, layout), (masks[:, :20], masks[:, 20:]), strict=True):
        densities = part.float().mean(1).double()
        shared = sum((part[i] & part[j]).sum().item() for i in range(5) for j in range(5) if i != j)
        assert found.density == pytest.approx(densities.mean().item())
        assert found.density_std == pytest.approx(densities.std().item())
        assert found.overlap == pytest.approx(shared / (4 * part.sum().item()))
    for task in range(1, 5):
        bank.remove(task)
    assert math.isnan(layer_statistics(bank, layout)[0].overlap)


def test_task_confusion_of_many_tasks_and_of_unknown_ones_is_drawn():
    few = plots.task_confusion(np.array([[0, 0, 9], [0, -1, 1], [1, 1, 10]]), num_tasks=2)
    assert [label.get_text() for label in few.axes[0].get_xticklabels()] == ["0", "1", "none"]
    assert few.axes[0].get_title() == "Tasks found: 0.9500"
    many = np.stack([np.arange(400), np.arange(400), np.full(400, 3)], axis=1)
    assert plots.task_confusion(many, num_tasks=400).axes[0].get_title() == "Tasks found: 1.0000"


def test_the_command_prints_json_and_one_line_errors(sweep):
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(sweep), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["varied"] == ["inference.objective", "network.output_size"]
    assert {group["seeds"] for group in found["groups"]} == {2}
    assert found["unfinished"][0]["error"] == "ValueError: no such thing"
    wrong = runner.invoke(app, ["report", str(sweep / "nowhere")])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("error: ")


def test_training_through_the_command_takes_the_same_overrides(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    wrong = CliRunner().invoke(app, ["train", "-m", "dat=permuted_digits", "seed=0,1"])
    assert wrong.exit_code == 1
    assert "Did you mean data?" in wrong.stderr
    assert sys.argv[1:] == ["-m", "dat=permuted_digits", "seed=0,1"]


def test_the_table_sorts_and_filters_in_a_browser(sweep):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    written = page.write([sweep], sweep / "report")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page()
        problems: list[str] = []
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda request: request.url.startswith("http") and problems.append(request.url))
        view.goto(written.path.as_uri())
        accuracies = view.locator("#table tbody tr td:nth-child(4)")
        view.locator("#table thead button").nth(3).click()
        ascending = [float(text.split()[0]) for text in accuracies.all_inner_texts()]
        assert ascending == sorted(ascending)
        view.locator("#table thead button").nth(3).click()
        assert [float(text.split()[0]) for text in accuracies.all_inner_texts()] == sorted(ascending, reverse=True)
        view.locator("#filter").fill("entropy 400")
        assert view.locator("#table tbody tr:visible").count() == 1
        assert view.locator("#shown").inner_text() == "1 of 6 rows"
        assert view.locator("figure svg").first.bounding_box()["width"] > 200
        assert view.screenshot(full_page=True).startswith(b"\x89PNG")
        browser.close()
    assert problems == []
