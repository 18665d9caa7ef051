"""Class-incremental numbers, against a slow version that loops over single images."""

import json

import pytest
import torch

from supsup_lightning import GG, GNU, ContinualDataModule, Discriminant, Given, OneShot
from supsup_lightning.callbacks import DrawFigures, WriteResults
from supsup_lightning.data import Digits, Split
from supsup_lightning.report import incremental
from supsup_lightning.report.metrics import TaskAccuracy
from supsup_lightning.runs.evaluate_run import evaluate
from tests.conftest import digits_lenet, fit
from tests.test_evaluation import train_here

nan = float("nan")


def split_digits(classes_per_task, *, steps):
    data = ContinualDataModule(Split(Digits(), classes_per_task=classes_per_task), steps_per_task=steps)
    data.setup()
    return data


@pytest.mark.parametrize("inference", [OneShot("entropy", images="each"), Discriminant("hidden")], ids=["mask", "gate"])
def test_numbers_are_those_of_a_loop_over_images(inference, tmp_path):
    data = split_digits(4, steps=25)  # 4, 4 and 2 classes
    rows = []  # of (right, number of images), after each task

    class Slowly(WriteResults):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            if not data.timetable.ends_task(trainer.current_epoch):
                return
            seen = [*range(data.timetable.tasks(trainer.current_epoch)[-1] + 1)]
            right = []
            for true in seen:
                for images, labels in data.test_loader(true):
                    # In the test's batches: at a kink of ReLU, the rounding of a batch of one turns a gradient.
                    found = zip(*pl_module.infer(images), labels, strict=True)
                    right += [task.item() == true and own.item() == label.item() for task, own, label in found]
            rows.append((sum(right), len(right)))

    write = Slowly(folder=tmp_path)
    module, trainer = fit(digits_lenet(), data, folder=tmp_path, scenario=GNU, inference=inference, callbacks=[write])
    trainer.test(module, data, verbose=False)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["images_per_decision"] == "each"
    counts = [len(images_of(data, task)) for task in range(3)]
    assert result["test_images_per_task"] == counts
    assert len(set(counts)) == 3  # else a mean over tasks would be the same
    assert result["last_accuracy"] == pytest.approx(rows[-1][0] / rows[-1][1], abs=2e-6)
    assert result["last_accuracy"] != pytest.approx(result["average_accuracy"], abs=1e-4)
    average = sum(right / number for right, number in rows) / len(rows)
    assert result["average_incremental_accuracy"] == pytest.approx(average, abs=2e-6)

    given = []
    for task in range(3):
        logits = [
            (module.method(image[None], task)[0, : data.num_classes[task]], label)
            for image, label in images_of(data, task)
        ]
        given.append(sum(own.argmax().item() == label for own, label in logits) / len(logits))
    assert result["task_incremental_accuracy_per_task"] == pytest.approx(given, abs=2e-6)
    assert result["task_incremental_accuracy"] == pytest.approx(sum(given) / 3, abs=2e-6)


def images_of(data, task):
    with torch.no_grad():
        return [
            (image, label.item())
            for images, labels in data.test_loader(task)
            for image, label in zip(images, labels, strict=True)
        ]


def test_a_row_that_was_not_tested_leaves_no_average():
    images = torch.tensor([30, 10, 60])
    matrix = torch.tensor([[1.0, nan, nan], [0.5, 0.9, nan], [0.4, 0.6, 0.8]])
    expected = (1 + (15 + 9) / 40 + (12 + 6 + 48) / 100) / 3
    assert incremental.average_incremental_accuracy(matrix, images) == pytest.approx(expected, abs=1e-6)
    for row, column in ((0, 0), (1, 0), (1, 1), (2, 1)):
        lacking = matrix.clone()
        lacking[row, column] = nan
        assert incremental.average_incremental_accuracy(lacking, images) is None
    assert incremental.last_accuracy(matrix, images) == pytest.approx(0.66)
    assert incremental.last_accuracy(matrix[:1], images) is None


def test_unknown_tasks_and_answers_of_another_kind_are_predicted_with_the_task_given(tmp_path):
    """A task that an inference calls unknown is -1, so not found."""
    data = split_digits(2, steps=25)
    module, _ = fit(digits_lenet(), data, folder=tmp_path, scenario=GNU, inference=OneShot("entropy"))
    images, labels = next(iter(data.test_loader(1)))
    right = module.classes(module.method(images, 1), 1) == labels
    for found in (torch.zeros_like(right), torch.arange(len(right)) % 3 == 0, torch.ones_like(right)):
        given = TaskAccuracy(5)
        outputs = {"right": right & found, "found": found}
        incremental.count_given(given, module, (images, labels), task=1, outputs=outputs)
        assert (given.right[1], given.images[1]) == (right.sum(), len(right))


def test_a_run_its_evaluations_and_a_given_task(tmp_path):
    folder = train_here(
        *(tmp_path / "run", "data=split_digits", "data.num_tasks=null", "scenario=gnu", "eval_at=[1,2]"),
    )
    run = json.loads((folder / "results.json").read_text())
    assert run["average_incremental_accuracy"] is None  # three and four tasks were not tested
    assert incremental.remarks(run) == [
        "average incremental accuracy needs a test after every task, which eval_at=all gives"
    ]
    again, given = evaluate(folder), evaluate(folder, ["scenario=gg"])
    for name in ("last_accuracy", "task_incremental_accuracy", "test_images_per_task", "images_per_decision"):
        assert again[name] == run[name]
    assert given["average_accuracy"] == run["task_incremental_accuracy"]
    assert given["accuracy_per_task"] == run["task_incremental_accuracy_per_task"]
    for name in ("last_accuracy", "average_incremental_accuracy", "task_incremental_accuracy", "images_per_decision"):
        assert given[name] is None
    first = evaluate(folder, ["data.num_tasks=1"])
    assert first["average_incremental_accuracy"] is None  # all five masks compete


@pytest.mark.parametrize(("scenario", "inference"), [(GNU, OneShot("entropy")), (GG, Given())])
def test_the_confusion_of_tasks_is_drawn_where_they_are_hidden(scenario, inference, tmp_path):
    data = split_digits(2, steps=5)
    draw = DrawFigures(folder=tmp_path / "figures")
    module, trainer = fit(
        digits_lenet(), data, folder=tmp_path, scenario=scenario, inference=inference, callbacks=[draw]
    )
    trainer.test(module, data, verbose=False)
    assert (tmp_path / "figures" / "task_confusion.png").exists() == (scenario is GNU)
