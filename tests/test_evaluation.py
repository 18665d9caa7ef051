"""`supsup evaluate`: tests finished masks again, beside the first results and never over them."""

import json
import shutil
import sys

import pytest
import typer
from typer.testing import CliRunner

from supsup_lightning.cli.evaluate import evaluate_command
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.runs.evaluate_run import evaluate
from tests.conftest import ROOT, TINY, two_classes_of_images

RUNS = {
    "each": ["inference=one_shot", "inference.images=each"],
    "binary": ["inference=binary", "inference.images=batch"],
    "given": ["scenario=gg"],
    "search": ["mask.rule=topk", "mask.sparsity=auto", "mask.search.candidates=[0.5,0.9]"],
    "hopfield": ["method=hopfield", "network.hidden_sizes=[32,32]"],
    "unannounced": [
        *("scenario=nns", "order=switching", "order.mean_steps=20", "data.num_tasks=3", "data.steps_per_task=60"),
        *("discovery.every=20", "discovery.on_unknown=combine", "inference=exhaustive", "eval_at=[]"),
    ],
    "batch_ensemble": ["method=batch_ensemble", "scenario=gns", "inference=exhaustive", "inference.objective=entropy"],
    "upper_bound": ["method=upper_bound", "data=split_digits", "data.num_tasks=null"],
    "own": ["--config-dir", str(ROOT / "examples" / "conf"), "inference=my_inference"],
}
# What evaluation measures again, or cannot know without training.
ANEW = {
    *("inference_ms_per_batch", "peak_memory_bytes", "forgetting", "backward_transfer", "evaluation"),
    "average_incremental_accuracy",
}


def train_here(folder, *overrides):
    """The command line of training, in this process."""
    import train

    given = [option.partition("=")[0] for option in overrides]
    tiny = [option for option in TINY if option.partition("=")[0] not in given]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *overrides, *tiny, f"hydra.run.dir={folder}"])
        patch.setattr(sys, "path", [*sys.path])
        train.main()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directories of finished runs by name; each is trained once, and a test gets a copy."""
    folders = {}

    def copy(name, to=None):
        if name not in folders:
            folders[name] = train_here(tmp_path_factory.mktemp(name) / "run", *RUNS[name])
        to = to or tmp_path_factory.mktemp("copy") / "run"
        return shutil.copytree(folders[name], to)

    return copy


def results(folder):
    return json.loads((folder / "results.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", RUNS)
def test_unchanged_options_give_the_numbers_of_the_run(finished, name):
    folder = finished(name)
    before = contents(folder)
    found = evaluate(folder)
    first = results(folder)
    assert first == results(folder) | {key: found[key] for key in found.keys() - ANEW - {"evaluation"}}
    assert found.keys() - first.keys() == {"evaluation"}
    assert found["forgetting"] is found["backward_transfer"] is None
    assert found["evaluation"]["run"]["digest"] == first["identity"]["digest"]
    assert {path: before.get(path) for path in contents(folder) if "evaluations" not in path.parts} == before
    assert results(folder / "evaluations" / "default") == found


@pytest.mark.parametrize("name", ["binary", "given"])
def test_other_options_give_the_numbers_of_a_run_that_was_trained_with_them(finished, name):
    found = evaluate(finished("each"), RUNS[name])
    trained = results(finished(name))
    for key in ("accuracy_per_task", "task_inference_accuracy", "scenario", "validation_accuracy_per_task"):
        assert found[key] == trained[key]
    assert found["evaluation"]["overrides"] == RUNS[name]


def test_the_task_may_be_hidden_that_was_given(finished):
    found = evaluate(finished("given"), ["scenario=gnu", "inference=one_shot", "inference.images=each"])
    assert found["accuracy_per_task"] == results(finished("each"))["accuracy_per_task"]


def test_the_same_evaluation_is_replaced_once_it_is_complete(finished, monkeypatch):
    folder = finished("each")
    evaluate(folder, ["inference.images=batch", "scenario=gns"])
    (place,) = (folder / "evaluations").iterdir()
    (place / "results.json").write_text("old")
    (place / "older.txt").write_text("")
    bank = (folder / "mask_bank.safetensors").read_bytes()
    (folder / "mask_bank.safetensors").write_bytes(bank[:100])
    with pytest.raises(DataError):
        evaluate(folder, ["scenario=gns", "inference.images=batch"])
    assert (place / "results.json").read_text() == "old"
    (folder / "mask_bank.safetensors").write_bytes(bank)
    evaluate(folder, ["scenario=gns", "inference.images=batch"])  # the same in another order
    assert [path.name for path in (folder / "evaluations").iterdir()] == [place.name]
    assert {path.name for path in place.iterdir()} >= {"results.json", "accuracy_matrix.csv"}
    assert results(place)["num_tasks"] == 2
    assert not (place / "older.txt").exists()


def test_fewer_tasks_are_tested_among_all_masks(finished):
    folder = finished("each")
    first, found = results(folder), evaluate(folder, ["data.num_tasks=1"])
    for name in ("accuracy_per_task", "validation_accuracy_per_task", "seconds_per_task", "num_classes"):
        assert found[name] == first[name][:1]
    assert (found["num_tasks"], found["num_masks"]) == (1, 2)
    assert found["validation_accuracy"] == first["validation_accuracy_per_task"][0]
    assert evaluate(finished("unannounced"), ["data.num_tasks=2"])["num_tasks"] == 2
    with pytest.raises(ConfigurationError, match="data.num_tasks=3 is more than the 2 tasks"):
        evaluate(folder, ["data.num_tasks=3"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seed=1"], "seed=1 needs masks that were trained with it.*seed=0"),
        (["method=psp"], "method=psp needs .*method=supsup"),
        (["network.output_size=50"], "network.output_size=50 needs .*=100"),
        (["mask.rule=topk"], "mask.rule=topk needs"),
        (["optimizer=sgd"], "optimizer=sgd needs"),
        (["data.seed=1"], "data.seed=1 makes other tasks.*data.seed=0"),
        (["data=rotated_digits"], "Rotated makes other tasks"),
        (["data=permuted_mnist"], r"add data.input_shape=\[1,8,8\] data.resize=true"),
        (["data.steps_per_task=7"], "training alone"),
        (["+trainer.max_time=1"], "training alone"),
        (["logger=csv"], "logger=csv has no effect"),
        (["callbacks=none"], "callbacks=none has no effect"),
        (["resume=true"], "resume=true has no effect"),
        (["experiment=rotated_mnist_36"], "an experiment sets what training depends on"),
        (["inference.temperature=2"], "needs inference.objective=entropy"),
        (["scenario=nns"], "scenario=nns does not go with a run of scenario=gnu"),
        (["inference=binary,exhaustive"], "several values"),
    ],
)
def test_what_needs_another_training_or_has_no_effect_is_refused(finished, overrides, said, tmp_path):
    folder = finished("each", tmp_path / "run")
    with pytest.raises(ConfigurationError, match=said):
        evaluate(folder, overrides)
    assert not list(folder.glob("evaluations/*"))


def test_other_images_are_named_and_changed_ones_refused(tmp_path):
    own, other = (two_classes_of_images(tmp_path / name, per_class=20) for name in ("own", "other"))
    options = ["data=image_folder", f"data.root={own}", "data.input_shape=[3,8,8]", "data.num_tasks=1", "scenario=gg"]
    folder = train_here(tmp_path / "run", *options, "data.batch_size=8", "data.num_workers=0")
    (other / "dark" / "19.png").unlink()
    found = evaluate(folder, [f"data.root={other}"])
    assert "other" in found["evaluation"]["other_data"][0]
    assert found["validation_accuracy"] is found["validation_accuracy_per_task"] is None
    with pytest.raises(ConfigurationError, match="would test images that the masks were trained on"):
        evaluate(folder, ["data.stream.source.test_share=0.5"])
    (own / "light" / "3.png").unlink()
    with pytest.raises(MismatchError, match="data have changed"):
        evaluate(folder)


def test_masks_of_another_run_are_refused(finished, tmp_path):
    folder = finished("each")
    shutil.copy(train_here(tmp_path / "seed", "seed=1") / "mask_bank.safetensors", folder)
    with pytest.raises(MismatchError, match="other weights"):
        evaluate(folder)
    shutil.copy(train_here(tmp_path / "steps", "data.steps_per_task=3") / "mask_bank.safetensors", folder)
    with pytest.raises(MismatchError, match="is not the bank"):
        evaluate(folder)
    (folder / "mask_bank.safetensors").unlink()
    with pytest.raises(DataError, match="is missing"):
        evaluate(folder)


def test_masks_in_a_hopfield_memory_come_with_the_checkpoint(finished):
    folder = finished("hopfield")
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(DataError, match="Hopfield memory does not tell its masks"):
        evaluate(folder)


def test_directories_without_a_finished_run(finished, tmp_path):
    folder = finished("each", tmp_path / "sweep" / "job")
    with pytest.raises(DataError, match="is no directory"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"one of them at a time: {folder}"):
        evaluate(tmp_path / "sweep")
    with pytest.raises(DataError, match="holds no run"):
        evaluate(folder / "checkpoints")
    evaluate(folder)
    with pytest.raises(DataError, match="is an evaluation"):
        evaluate(folder / "evaluations" / "default")
    shutil.copy(finished("given") / "run.json", folder)
    with pytest.raises(MismatchError, match="of different runs"):
        evaluate(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run.json is damaged"):
        evaluate(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results.json is damaged"):
        evaluate(folder)
    (folder / "results.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        evaluate(folder)


def test_the_command_prints_a_table_or_json_and_explains_errors(finished):
    app = typer.Typer()
    app.command()(evaluate_command)
    folder = finished("each")
    done = CliRunner().invoke(app, [str(folder), "scenario=gns", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == results(folder / "evaluations" / "scenario=gns")
    assert "the run itself: accuracy" in done.stderr
    assert "task found" in CliRunner().invoke(app, [str(folder)]).stdout
    refused = CliRunner().invoke(app, [str(folder), "scenario=gg", "inference=exhaustive"])
    assert "use inference=given" in refused.stderr
    refused = CliRunner().invoke(app, [str(folder), "inference.imags=each", "--json"])
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "Did you mean inference.images" in refused.stderr
