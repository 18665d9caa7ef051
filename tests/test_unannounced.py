"""The order of tasks in a stream that announces none, and the data module that serves it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup_lightning import DataModuleSequence, PermutedDigits, Unannounced
from supsup_lightning.discovery import Blocks, Recurring, Switching
from supsup_lightning.errors import ConfigurationError, MismatchError
from tests.test_datasets import Blobs

ORDERS = [Blocks(), Recurring(rounds=3), Switching(mean_steps=7)]


def same(one, other) -> bool:
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


@given(
    lengths=st.lists(st.integers(3, 60), min_size=1, max_size=6),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 10**6),
)
def test_every_task_gets_its_training_length_and_the_order_depends_on_the_seed_alone(lengths, order, seed):
    blocks = order.blocks(lengths, seed=seed)
    total = [0] * len(lengths)
    for task, steps in blocks:
        assert steps > 0
        total[task] += steps
    assert total == lengths
    assert blocks == order.blocks(lengths, seed=seed)


def test_switching_lasts_so_long_on_average_and_really_switches():
    blocks = Switching(mean_steps=50).blocks([20_000] * 5, seed=0)
    assert sum(block.steps for block in blocks) / len(blocks) == pytest.approx(50, rel=0.1)
    assert all(one.task != other.task for one, other in pairwise(blocks))
    assert {block.task for block in blocks} == set(range(5))
    assert blocks != Switching(mean_steps=50).blocks([20_000] * 5, seed=1)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
@pytest.mark.parametrize("length", [{"steps_per_task": 20}, {"epochs_per_task": 2, "batch_size": 200}])
def test_a_stream_is_made_of_each_tasks_own_batches_in_their_order(order, length):
    tasks = PermutedDigits(num_tasks=3, **length)
    stream = Unannounced(tasks, order)
    stream.setup()
    served = {task: [] for task in range(3)}
    for step, batch in enumerate(stream.batches(0, stream.num_steps)):
        served[stream.true_task(step)].append(batch)
    for task, batches in served.items():
        own = [batch for epoch in range(tasks.epochs_per_task) for batch in tasks.train_loader(task, epoch=epoch)]
        assert same(batches, own)


def test_a_stream_is_the_same_wherever_one_begins():
    stream = Unannounced(PermutedDigits(num_tasks=3, steps_per_task=20), Switching(mean_steps=7))
    stream.setup()
    whole = list(stream.batches(0, 60))
    for first, last in ((0, 13), (13, 14), (14, 60), (59, 60)):
        assert same(stream.batches(first, last), whole[first:last])


@pytest.mark.parametrize("length", [{"epochs_per_task": 2}, {"steps_per_task": 23}])  # several passes
def test_a_sequence_of_data_modules_shuffles_alike_wherever_one_begins(length):
    stream = Unannounced(DataModuleSequence([Blobs(3), Blobs(3, seed=1)], **length), Recurring(rounds=2))
    stream.setup()
    total = stream.num_steps

    def served(first):
        for step, batch in zip(range(first, total), stream.batches(first, total), strict=True):
            yield batch
            torch.manual_seed(step)  # as training does with what layers draw

    whole = list(served(0))
    for first in (1, total // 2 - 1, total - 3):
        torch.manual_seed(123)
        assert same(served(first), whole[first:])


def test_neither_batches_nor_epochs_tell_the_task():
    stream = Unannounced(PermutedDigits(num_tasks=2, steps_per_task=25), steps_per_epoch=20)
    stream.setup()
    assert stream.num_epochs == 3
    loader = stream.train_dataloader()
    assert len(loader) == 20
    for batch in loader:
        assert [tuple(part.shape) for part in batch] == [(128, 1, 8, 8), (128,)]
    assert stream.val_dataloader() == []
    assert not hasattr(stream, "timetable")
    assert [stream.true_tasks(epoch) for epoch in range(3)] == [{0: 1.0}, {0: 0.25, 1: 0.75}, {1: 1.0}]


def test_tasks_are_seen_where_the_first_block_of_one_ends():
    stream = Unannounced(PermutedDigits(num_tasks=3, steps_per_task=4), Recurring(rounds=2))
    seen = {step: stream.tasks_seen(step) for step in range(stream.num_steps)}
    assert {step: tasks for step, tasks in seen.items() if tasks} == {1: [0], 3: [0, 1], 5: [0, 1, 2]}


def test_a_checkpoint_of_another_order_is_refused():
    def stream(order):
        made = Unannounced(PermutedDigits(num_tasks=2, steps_per_task=25), order)
        made.setup()
        return made

    state = stream(Switching(mean_steps=7)).state_dict()
    stream(Switching(mean_steps=7)).load_state_dict(state)
    with pytest.raises(MismatchError, match="mean_steps=7 there, 8 here"):
        stream(Switching(mean_steps=8)).load_state_dict(state)
    with pytest.raises(MismatchError, match="order=Switching there, Blocks here"):
        stream(Blocks()).load_state_dict(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recurring(rounds=0), "order.rounds=0 must be an integer"),
        (lambda: Switching(mean_steps=0.5), "order.mean_steps=0.5 must be an integer"),
        (lambda: Recurring(rounds=9).blocks([20, 5], seed=0), "order.rounds=9 is more than the 5 steps"),
        (lambda: Blocks(tasks=[0, 0]).blocks([5, 5], seed=0), r"order.tasks=\[0, 0\] must name each task from 0 to 1"),
        (lambda: Unannounced(PermutedDigits(), steps_per_epoch=0), "datamodule.steps_per_epoch=0"),
    ],
)
def test_bad_options_of_orders_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
