"""Sums over features: what is added apart is as if added together, and a file gives them back."""

import pytest
import torch

from supsup_lightning.errors import DataError, MismatchError
from supsup_lightning.gate.class_sums import ClassSums, TaskSums


def test_sums_are_those_of_all_images_at_once():
    features, labels = _images(200, classes=3)
    sums = ClassSums()
    sums.add(4, TaskSums.of(zip(features.split(64), labels.split(64), strict=True), num_labels=5))
    assert sums.tasks.tolist() == [4, 4, 4]
    assert sums.labels.tolist() == [0, 1, 2]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row in range(3):
        own = features[labels == row].double()
        torch.testing.assert_close(sums.means[row], own.mean(0))
        assert sums.counts[row] == len(own)
        expected += (own - own.mean(0)).T @ (own - own.mean(0))
    torch.testing.assert_close(sums.scatter(4), expected)


@pytest.mark.parametrize("per_task", [False, True])
def test_four_shards_in_any_order_are_one(per_task):
    parts = [(task, *_images(80, classes=3, seed=task)) for task in range(3)]
    whole = _sums(parts, per_task=per_task)
    shards = [[] for _ in range(4)]
    for task, features, labels in parts:
        for shard, own in zip(shards, torch.randperm(80).split(20), strict=True):
            shard.append((task, features[own], labels[own]))
    merged = ClassSums(per_task=per_task)
    for shard in reversed(shards):
        merged.merge(_sums(shard, per_task=per_task))
    for task in range(3):
        torch.testing.assert_close(merged.scatter(task), whole.scatter(task), rtol=1e-12, atol=1e-12)
        for label in range(3):
            first, second = (_row(each, task, label) for each in (whole, merged))
            assert whole.counts[first] == merged.counts[second]
            torch.testing.assert_close(merged.means[second], whole.means[first], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_task", [False, True])
def test_a_file_gives_back_the_same_and_is_written_again_alike(per_task):
    sums = _sums([(task, *_images(90, classes=3, seed=task)) for task in range(2)], per_task=per_task)
    packed = sums.packed()
    read = ClassSums.unpacked(packed, per_task=per_task)
    assert all(torch.equal(packed[name], value) for name, value in read.packed().items())
    for task in range(2):
        scale = sums.scatter(task).diagonal().sqrt()
        apart = (read.scatter(task) - sums.scatter(task)) / torch.outer(scale, scale)
        assert apart.abs().max() < 1e-3
    torch.testing.assert_close(read.means, sums.means, rtol=0, atol=1e-3)
    assert packed["factors"].nbytes == len(sums.scatters) * 6 * 7 / 2 * 2
    assert packed["means"].nbytes == 6 * 6 * 2


def test_fewer_images_than_features_one_image_and_constant_features():
    features = torch.zeros(3, 6)
    features[:, 0] = torch.tensor([1.0, 2.0, 9.0])
    sums = _sums([(0, features, torch.tensor([0, 0, 1]))])
    read = sums.rounded()
    torch.testing.assert_close(read.means, sums.means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read.scatter(0), sums.scatter(0), rtol=1e-3, atol=1e-4)
    assert read.scatter(0)[0, 0] == pytest.approx(0.5, rel=1e-3)


def test_removal_is_exact_with_a_matrix_per_task_and_leaves_the_scatter_otherwise():
    parts = [(task, *_images(60, classes=2, seed=task)) for task in range(3)]
    for per_task in (True, False):
        sums = _sums(parts, per_task=per_task)
        sums.remove(1)
        without = _sums([parts[0], parts[2]], per_task=per_task)
        assert torch.equal(sums.means, without.means)
        assert torch.equal(sums.tasks, without.tasks)
        assert torch.equal(sums.scatters, without.scatters) == per_task
        with pytest.raises(KeyError, match="Task 1 has no sums"):
            sums.remove(1)


def test_sums_of_other_features_or_kinds_are_refused():
    sums = _sums([(0, *_images(20, classes=2))])
    with pytest.raises(MismatchError, match="4 features cannot join sums over 6"):
        sums.merge(_sums([(1, *_images(20, classes=2, features=4))]))
    with pytest.raises(MismatchError, match="one matrix per task"):
        sums.merge(ClassSums(per_task=True))
    with pytest.raises(MismatchError, match="per_task=false"):
        ClassSums.unpacked(sums.packed(), per_task=True)


@pytest.mark.parametrize("name", ["counts", "means", "factors", "tasks", "scales", "centre", "units", "scatter_tasks"])
def test_damaged_tables_are_refused(name):
    packed = _sums([(0, *_images(20, classes=2)), (1, *_images(20, classes=2))]).packed()
    value = packed[name]
    changes = [value[..., :-1], value[:-1]]
    changes.append(value.fill_(torch.nan).clone() if value.is_floating_point() else torch.full_like(value, -3))
    for change in changes:
        with pytest.raises((DataError, MismatchError), match="gate"):
            ClassSums.unpacked({**packed, name: change}, per_task=False)


def _images(number, *, classes, features=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    mixing = torch.randn(features, features, generator=draw)
    return torch.randn(number, features, generator=draw) @ mixing + labels.unsqueeze(1) + 3, labels


def _sums(parts, *, per_task=False):
    sums = ClassSums(per_task=per_task)
    for task, features, labels in parts:
        sums.add(task, TaskSums.of([(features, labels)], num_labels=int(labels.max()) + 1))
    return sums


def _row(sums, task, label):
    return int(((sums.tasks == task) & (sums.labels == label)).nonzero())


@pytest.mark.parametrize("per_task", [False, True])
def test_a_matrix_counts_all_of_its_images_those_of_removed_tasks_too(per_task):
    parts = [(task, *_images(50 + 10 * task, classes=2, seed=task)) for task in range(3)]
    sums = _sums(parts, per_task=per_task)
    sums.remove(2)
    again = ClassSums.unpacked(sums.packed(), per_task=per_task)
    expected = {0: 50, 1: 60} if per_task else {0: 180, 1: 180}
    for each in (sums, again):
        assert {task: each.scatter_count(task) for task in (0, 1)} == expected
    state = sums.state_dict()
    with pytest.raises(DataError, match="fewer images than its classes"):
        sums.check_state({**state, "scatter_counts": state["scatter_counts"] * 0})
