"""The learner of unannounced streams by itself: no Trainer, no callbacks, no module."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from supsup_lightning import AccuracyDiscovery, LeNet, LowerBound, PermutedDigits, SupSup
from supsup_lightning.discovery import Learner, Unannounced
from supsup_lightning.discovery.learner import num_batches
from supsup_lightning.errors import ConfigurationError
from tests.conftest import DIGITS


def make_method() -> SupSup:
    method = SupSup(LeNet(output_size=20, input_shape=DIGITS))
    method.keep_scores("host")
    return method


def make_stream() -> Unannounced:
    stream = Unannounced(PermutedDigits(num_tasks=3, steps_per_task=120))
    stream.setup()
    return stream


def learn(learner: Learner, method: SupSup, batches, *, first: int = 0, optimizer=None):
    """One training step per batch of the stream; returns the optimizer."""
    for step, (images, labels) in enumerate(batches, first):
        if learner.decide(step, (images, labels)):
            optimizer = Adam(method.trainable(), lr=3e-3, betas=(0.9, 0.99))
        logits = method.forward_live(images.unsqueeze(0))[0]
        optimizer.zero_grad()
        cross_entropy(logits, labels).backward()
        optimizer.step()
        learner.measure(logits.detach(), labels)
    return optimizer


def test_it_finds_the_tasks_of_a_stream_and_learns_a_mask_each():
    stream, method = make_stream(), make_method()
    learner = Learner(AccuracyDiscovery(every=40))
    learner.connect(method, num_classes=10)
    learn(learner, method, stream.batches(0, stream.num_steps))
    learner.end()

    begun = [decision.step for decision in learner.decisions if decision.action == "new mask"]
    assert begun[0] == 0
    assert len(begun) == len(method.bank) == 3
    assert all(0 <= late <= 40 for late in (begun[1] - 120, begun[2] - 240))
    assert sum(learner.steps.values()) == stream.num_steps
    assert not method.live.tasks
    method.eval()
    for task in range(3):
        images, labels = next(iter(stream.test_loader(task)))
        assert (method(images, task)[:, :10].argmax(1) == labels).float().mean() > 0.8


def test_it_continues_from_its_state_to_the_same_masks():
    stream = make_stream()
    whole, broken = make_method(), make_method()
    learner = Learner(AccuracyDiscovery(every=40))
    learner.connect(whole, num_classes=10)
    learn(learner, whole, stream.batches(0, stream.num_steps))
    learner.end()

    first = Learner(AccuracyDiscovery(every=40))
    first.connect(broken, num_classes=10)
    optimizer = learn(first, broken, stream.batches(0, 170))
    second = Learner(AccuracyDiscovery(every=40))
    second.connect(broken, num_classes=10)
    second.load_state_dict(first.state_dict())
    step = second.confirmed_step
    size = num_batches(next(stream.batches(0, 1)))
    second.resume(
        confirmed=list(stream.batches(step + 1 - size, step + 1)), window=list(stream.batches(170 - size, 170))
    )
    learn(second, broken, stream.batches(170, stream.num_steps), first=170, optimizer=optimizer)
    second.end()
    assert str(second.decisions) == str(learner.decisions)  # NaN equals nothing
    assert torch.equal(broken.bank.packed, whole.bank.packed)


def test_a_method_that_cannot_train_a_task_on_is_refused():
    with pytest.raises(ConfigurationError, match="LowerBound cannot train a finished task on"):
        Learner(AccuracyDiscovery()).connect(LowerBound(LeNet(output_size=20, input_shape=DIGITS)), num_classes=10)
