"""The memory by itself: random patterns, any dimension, no network."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup_lightning.bank.hopfield_memory import (
    PUBLISHED,
    RULES,
    Descent,
    HopfieldMemory,
    capacity,
    overlap,
    recover,
    signs,
)
from supsup_lightning.errors import ConfigurationError


def random_patterns(count: int, units: int, *, seed: int = 0):
    return signs(torch.randn(count, units, generator=torch.Generator().manual_seed(seed)))


def filled(patterns, *, sizes=None, rule="storkey") -> HopfieldMemory:
    memory = HopfieldMemory(sizes or [patterns.shape[1]], rule=rule)
    for pattern in patterns:
        memory.store(pattern)
    return memory


def with_flips(patterns, share: float, *, seed: int = 1):
    flips = torch.rand(patterns.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(flips, -patterns, patterns)


def slow_weights(patterns, rule):
    """The rule unit by unit."""
    d = patterns.shape[1]
    weights = [[0.0] * d for _ in range(d)]
    for z in patterns.tolist():
        h = [sum(weights[i][j] * z[j] for j in range(d)) for i in range(d)]
        for i in range(d):
            for j in range(d):
                change = z[i] * z[j] - (i == j)
                if rule == "storkey":
                    change -= z[i] * h[j] + h[i] * z[j]
                weights[i][j] += change / d
    return torch.tensor(weights)


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_the_rules_and_exactly_symmetric(rule):
    patterns = random_patterns(5, 12)
    (weights,) = filled(patterns, rule=rule).weights
    torch.testing.assert_close(weights, slow_weights(patterns, rule), rtol=1e-5, atol=1e-6)
    (large,) = filled(random_patterns(9, 301), rule=rule).weights
    assert torch.equal(large, large.T)


def test_energy_and_field_are_their_definitions():
    memory = filled(random_patterns(4, 10))
    (weights,) = memory.weights
    states = torch.randn(3, 2, 10)
    for state, energy, field in zip(
        states.view(-1, 10), memory.energy(states).view(-1), memory.field(states).view(-1, 10), strict=True
    ):
        torch.testing.assert_close(energy, -0.5 * state @ weights @ state)
        torch.testing.assert_close(field, weights @ state)


def test_a_pattern_is_an_eigenvector_when_storkeys_rule_adds_it():
    memory = filled(random_patterns(30, 200))
    assert memory.agreement(random_patterns(30, 200)[-1]) == pytest.approx(1, abs=1e-5)
    assert memory.agreement(random_patterns(1, 200, seed=5)[0]) < 0.6


def test_blocks_know_nothing_of_one_another():
    patterns = random_patterns(6, 50)
    both, first, second = filled(patterns, sizes=[30, 20]), filled(patterns[:, :30]), filled(patterns[:, 30:])
    state = torch.randn(50)
    torch.testing.assert_close(both.energy(state), first.energy(state[:30]) + second.energy(state[30:]))
    torch.testing.assert_close(both.field(state), torch.cat([first.field(state[:30]), second.field(state[30:])]))


@given(units=st.integers(40, 130), rule=st.sampled_from(RULES), seed=st.integers(0, 99))
def test_a_few_patterns_of_any_dimension_come_back_from_a_tenth_of_flips(units, rule, seed):
    patterns = random_patterns(3, units, seed=seed)
    memory = filled(patterns, rule=rule)
    start = with_flips(patterns, 0.1, seed=seed)
    assert torch.equal(recover(memory, start=start).state, patterns)
    assert torch.equal(signs(memory.field(patterns)), patterns)  # no unit is told to flip


@pytest.mark.parametrize(("count", "rule", "low", "high"), [(45, "storkey", 0.9, 1.0), (45, "hebbian", 0.0, 0.3)])
def test_storkeys_rule_holds_patterns_that_the_hebbian_one_loses(count, rule, low, high):
    assert capacity(256, "hebbian") < count < capacity(256, "storkey")
    patterns = random_patterns(count, 256)
    found = recover(filled(patterns, rule=rule), start=with_flips(patterns, 0.1)).state
    assert low <= (found == patterns).all(1).double().mean() <= high


def test_the_size_does_not_depend_on_the_patterns_and_the_packed_form_is_exact():
    empty, memory = HopfieldMemory([40, 17]), filled(random_patterns(8, 57), sizes=[40, 17])
    assert memory.num_bytes() == empty.num_bytes() == 4 * (40 * 41 // 2 + 17 * 18 // 2 + 57)
    packed = memory.packed()
    assert sum(t.numel() * t.itemsize for name, t in packed.items() if name != "num_patterns") == memory.num_bytes()
    empty.unpack(packed)
    for name, value in memory.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value), name
    fresh = HopfieldMemory([40, 17])
    fresh.load_state_dict(memory.state_dict())
    assert len(fresh) == 8
    assert torch.equal(fresh.mean(), memory.mean())


def test_what_is_no_pattern_is_refused():
    memory = HopfieldMemory([4])
    for pattern in (torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(5)):
        with pytest.raises(ValueError, match=r"A pattern is 4 values \+1 or -1"):
            memory.store(pattern)
    with pytest.raises(KeyError, match="nothing is stored yet"):
        recover(memory)
    with pytest.raises(ConfigurationError, match="method.memory='storky' is not known; choose one of storkey, hebb"):
        HopfieldMemory([4], rule="storky")


# Recovery.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wanted", [0, 4, 9])
def test_a_loss_chooses_among_the_patterns_from_their_mean(rule, wanted):
    patterns = random_patterns(10, 600)
    memory = filled(patterns, rule=rule)

    def loss(state):  # of a pattern that is only half right: the memory makes up for the rest
        return (state[:300] - patterns[wanted, :300]).square().mean()

    recovery = recover(memory, loss)
    assert torch.equal(recovery.state, patterns[wanted])
    distances = recovery.distances(patterns)
    steps = len(recovery.path) - 1
    assert distances.shape == (steps + 1, 10)
    assert recovery.energy.shape == recovery.loss.shape
    assert distances[-1, wanted] == 0
    assert distances[0].tolist() == (signs(memory.mean()) != patterns).sum(1).tolist()
    assert recovery.energy[-1] == memory.energy(patterns[wanted])
    assert recovery.agreement == memory.agreement(patterns[wanted])
    assert recovery.energy[-1] < recovery.energy[0]
    assert recovery.loss[-1] == loss(patterns[wanted]) < recovery.loss[0]
    assert steps < 30  # it ends where it rests


def test_recovery_works_in_inference_mode():
    patterns = random_patterns(4, 100)
    with torch.inference_mode():
        found = recover(filled(patterns), lambda state: -(state @ patterns[2])).state
    assert torch.equal(found, patterns[2])


def test_the_two_schedules_weigh_loss_and_energy():
    patterns, asked = random_patterns(4, 100), []
    memory = filled(patterns)

    def note(name, weight):
        return lambda progress: asked.append((name, progress)) or weight

    off = Descent(num_steps=4, loss_schedule=note("loss", 0.0), energy_schedule=note("energy", 0.0))
    start = memory.mean()
    still = recover(memory, lambda state: -(state @ patterns[1]), descent=off)
    assert torch.equal(still.state, signs(start))
    assert asked == [(name, step / 4) for step in range(1, 5) for name in ("loss", "energy")]
    loss_alone = Descent(num_steps=30, energy_weight=0.0, loss_schedule=lambda progress: 1.0)
    assert torch.equal(recover(memory, lambda state: -(state @ patterns[1]), descent=loss_alone).state, patterns[1])


def test_the_published_descent_equals_the_papers_steps():
    """The paper's own: scores s with mask 1[s >= 0], SGD with a step size of 500, momentum and weight decay."""
    patterns = random_patterns(5, 80)
    memory = filled(patterns)
    (weights,) = memory.weights
    target = random_patterns(1, 80, seed=3)[0]

    def objective(mask):
        return 3e-3 * (mask * target).sum().sin() + 2e-3 * (mask.sum() / 80 - 0.4).square()

    scores = memory.mean().requires_grad_()
    optimizer = torch.optim.SGD([scores], lr=500, momentum=0.9, weight_decay=1e-4)
    path = [scores.detach() >= 0]
    for step in range(1, 31):
        mask = (scores >= 0).float() + scores - scores.detach()
        z = 2 * mask - 1
        progress = step / 30
        loss = (1 - progress) * objective(mask) + 1.5e-3 * progress * (-0.5 * z @ weights @ z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(scores.detach() >= 0)
    found = recover(memory, lambda state: objective((1 + state) / 2), descent=PUBLISHED)
    assert torch.equal(found.path, torch.stack(path))
    assert (found.path[0] != found.path[-1]).sum() > 10  # something happened


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "inference.descent.num_steps=0 must be an integer of at least 1"),
        ({"step_size": 0.0}, "inference.descent.step_size=0.0 must be positive"),
        ({"momentum": 1.0}, r"inference.descent.momentum=1.0 must lie in \[0, 1\)"),
        ({"energy_weight": -1.0}, "inference.descent.energy_weight=-1.0 must not be negative"),
    ],
)
def test_a_descent_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Descent(**options)


def test_overlap_is_the_mean_product():
    patterns = random_patterns(6, 90)
    expected = [[(a * b).mean().item() for b in patterns] for a in patterns]
    torch.testing.assert_close(overlap(patterns, patterns), torch.tensor(expected))
