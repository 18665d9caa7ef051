import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.layout import Layout
from supsup_lightning.masks import (
    MaskOptions,
    Threshold,
    TopK,
    erdos_renyi_allocation,
    kaiming_uniform_scores,
    masked_weights,
    signed_constant_weights,
    uniform_allocation,
)
from supsup_lightning.seeding import generator

LAYOUT = Layout(("a", "b"), ((2, 3), (4,)))
RULES = [Threshold(), TopK(sizes=(6, 4), kept=(2, 3))]


@given(values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=30), data=st.data())
def test_topk_keeps_exactly_the_largest_also_among_ties(values, data):
    kept = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values)
    mask = TopK(sizes=(len(values),), kept=(kept,))(scores)
    by_order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:kept]
    assert mask.nonzero().flatten().tolist() == sorted(by_order)


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_goes_straight_through(rule):
    scores = torch.randn(10, generator=generator(0, "test")).requires_grad_()
    frozen, direction = torch.randn(10), torch.randn(10)
    effective = LAYOUT.flatten(masked_weights(scores, frozen, rule, LAYOUT))
    assert torch.equal(effective, frozen * rule(scores))
    (effective * direction).sum().backward()
    slope = scores.detach().sign() if isinstance(rule, TopK) else 1  # of |s| and of s
    assert torch.equal(scores.grad, frozen * direction * slope)


@pytest.mark.parametrize("rule", RULES)
def test_vmap_over_tasks_equals_a_loop(rule):
    scores, frozen = torch.randn(3, 10), torch.randn(10)

    def loss(s):
        return (LAYOUT.flatten(masked_weights(s, frozen, rule, LAYOUT)) ** 2).sum() / 2

    gradients = torch.func.vmap(torch.func.grad(loss))(scores)
    expected = torch.stack([torch.func.grad(loss)(s) for s in scores])
    assert torch.equal(gradients, expected)
    batched = torch.func.vmap(lambda s: masked_weights(s, frozen, rule, LAYOUT), in_dims=1)(scores.T)
    assert torch.equal(LAYOUT.flatten(batched, batch_dims=1), torch.stack([frozen * rule(s) for s in scores]))


def test_a_score_of_zero_is_on_in_training_as_in_the_mask():
    scores = torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1e-40, 1.0, -1.0] * 5)
    assert torch.equal(Threshold().masked(scores, torch.ones(35)), (scores >= 0).float())


def test_a_layer_without_gradient_leaves_its_scores_alone():
    scores = torch.ones(10, requires_grad=True)
    masked_weights(scores, torch.ones(10), Threshold(), LAYOUT)["b"].sum().backward()
    assert scores.grad.tolist() == [0.0] * 6 + [1.0] * 4


def test_initialisers():
    shapes = [(20, 50), (10, 20, 3, 3)]
    scores = kaiming_uniform_scores(shapes, generator(0, "a"))
    assert scores[:1000].abs().max() <= 1 / 50**0.5
    assert scores[:1000].abs().max() > 0.95 / 50**0.5
    assert scores[1000:].abs().max() <= 1 / 180**0.5
    weights = signed_constant_weights(shapes, generator(0, "a"))
    torch.testing.assert_close(weights[:1000].abs(), torch.full((1000,), (2 / 50) ** 0.5))
    torch.testing.assert_close(weights[1000:].abs(), torch.full((1800,), (2 / 180) ** 0.5))
    assert abs(weights[:1000].sign().mean()) < 0.1


@given(sparsity=st.floats(0.5, 0.99))
def test_erdos_renyi_meets_the_sparsity_and_spares_small_layers(sparsity):
    shapes = [(300, 784), (100, 300), (100, 100), (64, 32, 3, 3)]
    kept = erdos_renyi_allocation(shapes, sparsity)
    sizes = [235200, 30000, 10000, 18432]
    assert abs(sum(kept) - (1 - sparsity) * sum(sizes)) <= len(shapes)
    density = [k / s for k, s in zip(kept, sizes, strict=True)]
    assert density[0] <= density[1] <= density[2] <= 0.5
    free = [d for d in density if d < 0.4999]  # the others are at the cap
    if len(free) >= 2 and density[1] < 0.4999:
        assert density[1] / density[0] == pytest.approx((400 / 30000) / (1084 / 235200), rel=0.02)


def test_uniform_allocation_counts_to_the_weight():
    assert uniform_allocation([(300, 784), (100, 300)], 0.9) == (23520, 3000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "topk", "sparsity": -0.1}, r"mask.sparsity=-0.1 .* \[0, 1\)"),
        ({"rule": "topk", "sparsity": 1.0}, r"mask.sparsity=1.0 .* \[0, 1\)"),
        ({"rule": "threshold", "sparsity": 1.5}, r"mask.sparsity=1.5 .* \[0, 1\)"),
        ({"rule": "threshold", "sparsity": 0.5}, "sparsity=0.5 has no effect with mask.rule=threshold"),
        ({"rule": "threshold", "budget": 4}, "budget=4 has no effect with mask.rule=threshold"),
        ({"rule": "threshold", "allocation": "erdos_renyi"}, "mask.allocation=erdos_renyi has no effect"),
        ({"rule": "topk"}, "needs mask.sparsity"),
        ({"rule": "topk", "sparsity": 0.999}, r"leaves no weight of the layer of shape \(10, 10\)"),
        ({"rule": "topk", "sparsity": 0.3, "allocation": "erdos_renyi"}, "at least 0.5"),
        ({"rule": "topk", "budget": 4}, "mask.budget=4 is for mask.allocation=erdos_renyi"),
        ({"rule": "topk", "budget": 4, "sparsity": 0.9, "allocation": "erdos_renyi"}, "and not both"),
        ({"rule": "topk", "budget": -1, "allocation": "erdos_renyi"}, "mask.budget=-1 must be positive"),
        ({"rule": "topk", "budget": 1e-9, "allocation": "erdos_renyi"}, "mask.budget=1e-09 leaves no weight"),
    ],
)
def test_bad_options_are_refused(options, message):
    options = {"sparsity": None, "allocation": "uniform", "budget": None, **options}
    with pytest.raises(ConfigurationError, match=message):
        MaskOptions(**options).make_rule([(100, 100), (10, 10)])


def test_a_budget_gives_each_layer_the_papers_density():
    shapes = [(20, 3, 3, 3), (160, 80, 3, 3), (5, 160)]
    rule = MaskOptions(rule="topk", allocation="erdos_renyi", budget=16).make_rule(shapes)
    # min(0.5, b (out + in) / (out in kh kw)): the middle layer is the only one below the cap
    assert rule.kept == (270, round(16 * 240 / (160 * 80 * 9) * 160 * 80 * 9), 400)
    mask = rule(torch.randn(sum(rule.sizes), generator=torch.Generator().manual_seed(0)))
    assert mask.sum() == sum(rule.kept)
