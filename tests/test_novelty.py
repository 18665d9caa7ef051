"""Batches of known and of new tasks, told apart by the means of their classes; unannounced streams of look-alikes."""

import pytest
import torch

from supsup_lightning import (
    ContinualDataModule,
    ContinualModule,
    Discriminant,
    Exhaustive,
    NoveltyDiscovery,
    Unannounced,
)
from supsup_lightning.data import Digits, Split
from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.gate.class_shift import shift
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant
from supsup_lightning.scenario import NNS
from tests.conftest import StopAfter, digits_lenet, fit
from tests.test_class_sums import _images, _sums


@pytest.mark.parametrize("per_task", [False, True])
def test_the_distance_is_the_mean_over_pairs_of_images(per_task):
    sums = _sums([(task, *_images(600, classes=3, seed=task)) for task in range(2)], per_task=per_task)
    discriminant = LinearDiscriminant(sums, torch.arange(2), regularisation=0.01)
    features, labels = _images(40, classes=3, seed=8)
    found = shift(discriminant, features, labels)
    for task in range(2):
        part = discriminant.covariances[task if per_task else 0]
        inverse = torch.cholesky_inverse(part.factor.double())
        expected = 0.0
        for label in range(3):
            mean = sums.means[(sums.tasks == task) & (sums.labels == label)]
            apart = features[labels == label].double() - mean
            pairs = apart @ inverse @ apart.T
            expected += (pairs.sum() - pairs.trace()) / (len(apart) - 1) / len(features)
        assert found.distances[task] == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


def test_it_is_zero_on_average_for_the_same_task_with_the_stated_deviation():
    features, labels = _images(60_000, classes=8, features=60)  # eight images of a label per batch
    discriminant = LinearDiscriminant(_sums([(0, features, labels)]), torch.tensor([0]), regularisation=1e-3)
    batches = zip(features[:19_200].split(64), labels[:19_200].split(64), strict=True)
    found = [shift(discriminant, *batch) for batch in batches]
    distances = torch.cat([each.distances for each in found])
    deviation = torch.cat([each.deviation for each in found]).mean().item()
    assert abs(distances.mean()) < 4 * deviation / len(found) ** 0.5
    assert distances.std().item() == pytest.approx(deviation, rel=0.15)


def test_labels_that_a_task_never_had():
    sums = _sums([(0, *_images(60, classes=2)), (1, *_images(90, classes=3, seed=1))])
    discriminant = LinearDiscriminant(sums, torch.arange(2), regularisation=0.01)
    assert shift(discriminant, *_images(30, classes=3, seed=1)).distances.isinf().tolist() == [True, False]
    with pytest.raises(DataError, match="no label has two"):
        shift(discriminant, torch.zeros(2, 6), torch.arange(2))


@pytest.fixture(scope="module")
def discovered(tmp_path_factory):
    return fit(digits_lenet(), _stream(), folder=tmp_path_factory.mktemp("nns"), **_options())


def test_a_stream_of_look_alikes_gets_one_mask_per_task(discovered):
    module, trainer = discovered
    trainer.test(module, _stream(), verbose=False)
    assert len(module.method.bank) == 5
    assert module.true_tasks == {task: task for task in range(5)}
    assert module.test_accuracy.compute()[1].float().mean() > 0.9
    assert not len(module.method.gate.pending)


def test_a_resumed_stream_ends_with_the_same_bytes(discovered, tmp_path):
    module, _ = discovered
    fit(digits_lenet(), _stream(), folder=tmp_path, callbacks=[StopAfter(1, tmp_path / "half.ckpt")], **_options())
    resumed, _ = fit(digits_lenet(), _stream(), folder=tmp_path, checkpoint=tmp_path / "half.ckpt", **_options())
    for name, value in module.method.kept().items():
        assert torch.equal(resumed.method.kept()[name], value), name


def test_what_came_after_the_stream_changed_is_dropped():
    gate = ContinualModule(digits_lenet(), inference=Discriminant("hidden")).method.gate
    gate.sums = _sums([(0, *_images(60, classes=2))])
    for task, kept in ((0, True), (1, False)):
        gate.pending = _sums([(0, *_images(20, classes=2, seed=3))])
        before = int(gate.sums.counts.sum())
        gate.settle(task, finished={0, 1})
        assert int(gate.sums.counts.sum()) - before == 20 * kept
    gate.pending = _sums([(1, *_images(20, classes=2, seed=3))])
    gate.settle(0, finished={0, 1})  # a new task's only images are kept
    assert gate.sums.tasks.unique().tolist() == [0, 1]
    gate.pending = _sums([(2, *_images(20, classes=2, seed=3))])
    gate.settle(2, finished={0, 1})  # and those of a combination that was given up are not
    assert gate.sums.tasks.unique().tolist() == [0, 1]


def test_it_needs_the_gate(tmp_path):
    options = {**_options(), "inference": Exhaustive("entropy")}
    with pytest.raises(ConfigurationError, match="use inference=discriminant"):
        fit(digits_lenet(), _stream(), folder=tmp_path, **options)
    with pytest.raises(ConfigurationError, match="discovery.deviations=0"):
        NoveltyDiscovery(deviations=0)


def _stream() -> Unannounced:
    return Unannounced(ContinualDataModule(Split(Digits(), classes_per_task=2), steps_per_task=60), steps_per_epoch=60)


def _options():
    return {"inference": Discriminant(), "scenario": NNS, "discovery": NoveltyDiscovery(every=30)}
