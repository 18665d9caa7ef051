"""Tasks trained on after they were finished, and tasks that are linear combinations of masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from supsup_lightning import Binary, OneShot, SupSup
from supsup_lightning.bank.combinations import Combinations
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.inference.objectives import entropy
from supsup_lightning.inference.one_shot import confidence_gain
from supsup_lightning.masks import Threshold, TopK
from tests.conftest import random_images, random_method


def combined_method(**options) -> SupSup:
    """Three random masks, and tasks 3 and 4 that combine them."""
    method = random_method(3, **options)
    for task, coefficients in ((3, [0.5, -0.25, 1.0]), (4, [0.0, 2.0, 0.125])):
        method.begin_combination(task)
        with torch.no_grad():
            method.live.values[0, :3] = torch.tensor(coefficients)
        method.finish_task(task)
    return method


def dense(method: SupSup) -> torch.Tensor:
    """Every task's weights as floats, ``(tasks, weights)``: the slow and obvious version."""
    masks = torch.stack([method.bank.get(task).float() for task in method.bank.tasks.tolist()])
    combined = method.combinations.matrix(method.bank.tasks) @ masks
    return torch.cat([masks, combined]) * method.frozen


def in_superposition(method: SupSup) -> torch.Tensor:
    """A combination counts as a mean of its masks: its coefficients have a magnitude of 1 in all."""
    return dense(method) / torch.tensor([1.0, 1.0, 1.0, 1.75, 2.125]).unsqueeze(1)


def test_a_combination_is_the_sum_of_its_masks():
    method = combined_method()
    assert method.tasks.tolist() == [0, 1, 2, 3, 4]
    assert method.num_masks == 3
    for task, weights in enumerate(dense(method)):
        torch.testing.assert_close(method.layout.flatten(method.effective(task)), weights)
    torch.testing.assert_close(method.layout.flatten(method.superposed()), in_superposition(method).mean(0))
    coefficients = torch.tensor([0.1, 0.0, 0.4, 0.3, -0.2])
    expected = coefficients @ in_superposition(method)
    torch.testing.assert_close(method.layout.flatten(method.superposed(coefficients)), expected)


def test_gains_of_combinations_equal_autograd_through_dense_masks():
    method, images = combined_method(), random_images(6)

    def objective(coefficients):
        weights = method.layout.split(coefficients @ in_superposition(method))
        return entropy(functional_call(method.network, weights, (images,)), 10).mean()

    expected = -grad(objective)(torch.full((5,), 0.2))
    torch.testing.assert_close(confidence_gain(method, images, 10, entropy), expected)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(confidence_gain(method, images, 10, entropy, rows=rows), expected[rows])
    assert OneShot("entropy", images="batch")(method, images, 10)[0] == expected.argmax()
    assert Binary("entropy", images="batch")(method, images, 10)[0] in range(5)


def test_coefficients_are_trained_by_the_true_gradient():
    method, images = random_method(3), random_images(8)
    labels = torch.arange(8) % 10
    method.begin_combination(3)
    assert method.live.values[0, :3].tolist() == pytest.approx([1 / 3] * 3)
    cross_entropy(method(images, 3), labels).backward()

    def loss(coefficients):
        weights = method.layout.split(coefficients @ dense(method)[:3])
        return cross_entropy(functional_call(method.network, weights, (images,)), labels)

    torch.testing.assert_close(method.live.values.grad[0, :3], grad(loss)(torch.full((3,), 1 / 3)))
    assert not method.live.values.grad[0, 3:].any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(method.layout.flatten(method.effective(3)), dense(method)[:3].mean(0))


def test_masks_under_a_combination_stay_and_later_masks_do_not_change_it():
    method, images = combined_method(), random_images(5)
    before = [method(images, task) for task in range(5)]
    method.begin_task(5)
    method.finish_task(5)
    method.reopen_task(1)
    logits = method(images, 1)
    torch.testing.assert_close(logits, before[1])
    logits.sum().backward()  # there is a gradient for those who wait for one, and it is 0
    assert not method.live.values.grad.any()
    with torch.no_grad():
        method.live.values.neg_()
    method.finish_task(1)
    assert all(torch.equal(method(images, task), logits) for task, logits in enumerate(before))

    method.reopen_task(3)  # on which nothing rests
    assert method.live.values[0, :4].tolist() == [0.5, -0.25, 1.0, 0.0]
    with torch.no_grad():
        method.live.values[0, 3] = 1.0
    method.finish_task(3)
    assert not torch.equal(method(images, 3), before[3])
    assert method.combinations.get(3, method.bank.tasks).tolist() == [0.5, -0.25, 1.0, 1.0]


def test_a_combination_is_in_checkpoint_and_file_and_costs_a_number_a_mask(tmp_path):
    method, images = combined_method(), random_images(5)
    method.save(tmp_path / "bank.safetensors")
    from_file, from_state = random_method(0), random_method(0)
    from_file.load(tmp_path / "bank.safetensors")
    from_state.load_state_dict(method.state_dict())
    for other in (from_file, from_state):
        assert other.tasks.tolist() == [0, 1, 2, 3, 4]
        assert all(torch.equal(other(images, task), method(images, task)) for task in range(5))
    assert method.combination_bytes() == 3 * 4
    assert [method.bytes_of(task) for task in (0, 3)] == [method.task_bytes(), 12]
    plain = random_method(3)
    plain.save(tmp_path / "plain.safetensors")
    assert len(method.sparsity()) == 5
    with pytest.raises(MismatchError, match="combinations of its masks, which cannot be merged"):
        plain.merge(tmp_path / "bank.safetensors")


def test_a_mask_that_a_combination_rests_on_cannot_be_lost_unnoticed():
    method = combined_method()
    method.bank.remove(0)
    with pytest.raises(KeyError, match=r"masks of tasks \[0\], which are not there"):
        method(random_images(1), 3)
    combined = Combinations()
    combined.set(9, torch.tensor([1.0, 0.0]), masks=torch.tensor([4, 5]))
    assert combined.matrix(torch.tensor([6, 4])).tolist() == [[0.0, 1.0]]  # nothing rests on 5


def test_a_combination_of_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="there is no mask yet"):
        random_method(0).begin_combination(0)
    with pytest.raises(ConfigurationError, match="Task 3 is finished"):
        combined_method().begin_combination(3)


# Trained on.


@pytest.mark.parametrize("place", ["device", "host"])
def test_kept_scores_come_back_exactly_and_through_a_checkpoint(place):
    method = random_method(0)
    method.keep_scores(place)
    for task in (0, 1):
        method.begin_task(task)
        with torch.no_grad():
            method.live.values.add_(
                torch.randn(method.live.values.shape, generator=torch.Generator().manual_seed(task))
            )
        scores = method.live.values[0].detach().clone()
        method.finish_task(task)
    assert method.kept_scores.num_bytes() == 2 * 4 * method.layout.num_weights
    restored = random_method(0)
    restored.keep_scores(place)
    restored.load_state_dict(method.state_dict())
    random_method(0).load_state_dict(method.state_dict())  # to predict, scores are not needed
    for one in (method, restored):
        one.reopen_task(0)
        one.reopen_task(1)
        assert torch.equal(one.live.values[0], scores)


def test_without_kept_scores_they_are_made_of_the_bits():
    for options in ({}, {"rule": "topk", "sparsity": 0.7}):
        method = random_method(2, **options)
        method.keep_scores("bits")
        method.reopen_task(1)
        assert torch.equal(method.rule(method.live.values[0]) > 0, method.bank.get(1))
        assert method.kept_scores.num_bytes() == 0


@given(sizes=st.lists(st.tuples(st.integers(2, 40), st.floats(0.05, 0.95)), min_size=1, max_size=4), seed=st.integers())
@settings(max_examples=60)
def test_scores_made_of_bits_have_that_mask_and_the_drawn_magnitudes(sizes, seed):
    kept = tuple(max(1, round(size * share)) for size, share in sizes)
    draw = torch.Generator().manual_seed(seed % 2**60)
    layers = tuple(size for size, _ in sizes)
    for rule in (Threshold(), TopK(layers, kept)):
        mask = rule(torch.randn(sum(layers), generator=draw)) > 0
        drawn = torch.randn(sum(layers), generator=draw)
        scores = rule.scores_of(mask, drawn)
        assert torch.equal(rule(scores) > 0, mask)
        for one, other in zip(scores.split(layers), drawn.split(layers), strict=True):
            assert torch.equal(one.abs().sort().values, other.abs().sort().values)


def test_committing_goes_on_training_and_evaluation_sees_what_is_committed():
    method, images = random_method(1), random_images(4)
    method.begin_task(1)
    method.commit_task(1)
    committed = method.bank.get(1).clone()
    with torch.no_grad():
        method.live.values.neg_()
    live = method(images, 1)
    method.eval()
    assert not torch.equal(method(images, 1), live)
    assert torch.equal(method.layout.flatten(method.effective(1)), committed * method.frozen)
    method.train()
    method.commit_task(1)
    assert torch.equal(method(images, 1), live)
    assert torch.equal(method.bank.get(1), ~committed)
    counts = sum(method.bank.get(task).int() for task in (0, 1))
    assert torch.equal(method.bank.counts, counts)


def test_random_masks_leave_no_trace():
    method = random_method(2)
    state = {name: value.clone() for name, value in method.bank.state_dict().items()}
    with method.with_random_masks(3):
        assert sorted(method.tasks.tolist()) == [-3, -2, -1, 0, 1]
    assert all(torch.equal(value, method.bank.state_dict()[name]) for name, value in state.items())
    assert torch.equal(method.bank.counts, method.bank._count())
