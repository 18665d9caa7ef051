import math

import pytest
import torch
from torch.func import functional_call

from supsup_lightning import Binary, Exhaustive, OneShot
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.inference.objectives import OBJECTIVES, entropy, max_probability, superfluous
from supsup_lightning.inference.one_shot import confidence_gain, confidence_gain_each
from tests.conftest import random_images, random_method, run_cli_here

CLASSES = 10


def slow_gain(method, images, objective, coefficients):
    """Autograd through ``k`` float masks: what one backward pass and ``k`` inner products have to equal."""
    masks = torch.stack([method.bank.get(task).float() for task in method.tasks.tolist()])
    coefficients = coefficients.clone().requires_grad_()
    parameters = method.layout.split((coefficients @ masks) * method.frozen)
    logits = functional_call(method.network, parameters, (images,))
    return -torch.autograd.grad(objective(logits, CLASSES).mean(), coefficients)[0]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("num_tasks", [1, 2, 7])
def test_one_shot_equals_autograd_through_stacked_masks(objective, num_tasks):
    method, images = random_method(num_tasks), random_images(4)
    uniform = torch.full((num_tasks,), 1 / num_tasks)
    expected = slow_gain(method, images, objective, uniform)
    torch.testing.assert_close(confidence_gain(method, images, CLASSES, objective), expected, rtol=1e-5, atol=1e-5)
    coefficients = torch.rand(num_tasks)
    torch.testing.assert_close(
        confidence_gain(method, images, CLASSES, objective, coefficients),
        slow_gain(method, images, objective, coefficients),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_gain_of_each_image_equals_that_of_the_image_alone(objective):
    method, images = random_method(5), random_images(40)
    alone = torch.stack([confidence_gain(method, image, CLASSES, objective) for image in images.split(1)])
    torch.testing.assert_close(confidence_gain_each(method, images, CLASSES, objective), alone, rtol=1e-5, atol=1e-5)


def test_it_works_in_inference_mode():
    method, images = random_method(3), random_images(4)
    outside = OneShot(images="each")(method, images, CLASSES)
    with torch.inference_mode():
        assert torch.equal(OneShot(images="each")(method, images, CLASSES), outside)


def slow_binary(method, images, objective):
    active = list(range(len(method.tasks)))
    gradients = 0
    while len(active) > 1:
        coefficients = torch.zeros(len(method.tasks))
        coefficients[active] = 1 / len(active)
        gain = slow_gain(method, images, objective, coefficients)
        gradients += 1
        active = sorted(active, key=lambda task: -gain[task])[: math.ceil(len(active) / 2)]
    return active[0], gradients


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 8, 13])
def test_binary_equals_a_slow_search_in_log2_k_gradients(num_tasks, monkeypatch):
    method, images = random_method(num_tasks), random_images(6)
    expected, gradients = slow_binary(method, images, superfluous)
    assert gradients == (math.ceil(math.log2(num_tasks)) if num_tasks > 1 else 0)
    calls = []
    project = method.project
    monkeypatch.setattr(method, "project", lambda g, rows=None: calls.append(1) or project(g, rows))
    assert Binary("superfluous", images="batch")(method, images, CLASSES).tolist() == [expected] * 6
    assert len(calls) == gradients
    each = Binary("superfluous", images="each")(method, images, CLASSES)
    assert each.tolist() == [slow_binary(method, image, superfluous)[0] for image in images.split(1)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_exhaustive_takes_the_lowest_objective(name):
    method, images = random_method(6), random_images(8)
    values = torch.stack([OBJECTIVES[name](method(images, task), CLASSES) for task in range(6)])
    assert Exhaustive(name, images="each")(method, images, CLASSES).tolist() == values.argmin(0).tolist()
    assert Exhaustive(name, images=3)(method, images, CLASSES).tolist() == [values[:, :3].mean(1).argmin().item()] * 8


def test_how_many_images_decide():
    method, images = random_method(5), random_images(8)

    def position(count):
        return confidence_gain(method, images[:count], CLASSES, superfluous).argmax().item()

    assert OneShot(images=1)(method, images, CLASSES).tolist() == [position(1)] * 8
    assert OneShot(images=3)(method, images, CLASSES).tolist() == [position(3)] * 8
    assert OneShot(images=99)(method, images, CLASSES).tolist() == [position(8)] * 8
    assert OneShot(images="batch")(method, images, CLASSES).tolist() == [position(8)] * 8


def test_answers_are_task_numbers_also_when_some_were_removed():
    method, images = random_method(5), random_images(8)
    method.bank.remove(0)
    method.bank.remove(2)
    values = torch.stack([entropy(method(images, task), CLASSES) for task in (1, 3, 4)])
    expected = torch.tensor([1, 3, 4])[values.argmin(0)]
    assert torch.equal(Exhaustive("entropy", images="each")(method, images, CLASSES), expected)


@pytest.mark.parametrize("inference", [OneShot, Binary])
@pytest.mark.parametrize("images", ["batch", "each"])
def test_as_many_candidates_as_tasks_are_exhaustive(inference, images):
    method, inputs = random_method(7), random_images(12)
    exhaustive = Exhaustive("entropy", images=images)(method, inputs, CLASSES)
    assert torch.equal(inference("entropy", images=images, candidates=7)(method, inputs, CLASSES), exhaustive)
    assert torch.equal(inference("entropy", images=images, candidates=100)(method, inputs, CLASSES), exhaustive)
    judged = inference("superfluous", images=images, candidates=7, candidate_objective="entropy")
    assert torch.equal(judged(method, inputs, CLASSES), exhaustive)


@pytest.mark.parametrize("images", ["batch", "each"])
def test_candidates_are_the_tasks_with_the_largest_gain(images):
    method, inputs = random_method(9), random_images(12)
    gain = (
        confidence_gain_each(method, inputs, CLASSES, entropy)
        if images == "each"
        else confidence_gain(method, inputs, CLASSES, entropy).expand(12, -1)
    )
    objective = torch.stack([entropy(method(inputs, task), CLASSES) for task in range(9)], dim=1)
    if images == "batch":
        objective = objective.mean(0).expand(12, -1)
    favoured = gain.topk(3).indices
    expected = favoured.gather(1, objective.gather(1, favoured).argmin(1, keepdim=True))[:, 0]
    found = OneShot("entropy", images=images, candidates=3)(method, inputs, CLASSES)
    assert torch.equal(found, expected)
    assert not torch.equal(found, gain.argmax(1))  # to try them changes answers here


def test_the_gain_of_one_layer_leaves_out_the_others():
    method, inputs = random_method(6), random_images(8)
    names = method.layout.names
    parts = [confidence_gain(method, inputs, CLASSES, entropy, layers=[name]) for name in names]
    torch.testing.assert_close(sum(parts), confidence_gain(method, inputs, CLASSES, entropy))
    first = confidence_gain(method, inputs, CLASSES, entropy, layers="first")
    assert torch.equal(first, parts[0])
    each = confidence_gain_each(method, inputs, CLASSES, entropy, layers="first")
    alone = torch.stack([confidence_gain(method, image, CLASSES, entropy, layers="first") for image in inputs.split(1)])
    torch.testing.assert_close(each, alone, rtol=1e-5, atol=1e-5)
    found = OneShot("entropy", images="batch", layers="first")(method, inputs, CLASSES)
    assert (found == first.argmax()).all()


def test_a_pattern_of_layers_that_matches_nothing_is_refused_before_training(tmp_path):
    done = run_cli_here("inference=one_shot", "inference.layers=[layer9.*]", cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "inference.layers: the pattern 'layer9.*' matches no masked parameter of the network (" in done.stderr


def test_objectives_against_their_definitions():
    logits = torch.randn(5, 12, requires_grad=True)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy(logits, CLASSES), -(p * p.log()).sum(-1))
    torch.testing.assert_close(max_probability(logits, CLASSES), -p.max(-1).values)
    warm = (logits / 3).softmax(-1)
    torch.testing.assert_close(entropy(logits, CLASSES, temperature=3.0), -(warm * warm.log()).sum(-1))
    torch.testing.assert_close(superfluous(logits, CLASSES), -p[:, :CLASSES].sum(-1).log())
    (gradient,) = torch.autograd.grad(superfluous(logits, CLASSES).sum(), logits)
    assert torch.equal(gradient[:, :CLASSES], torch.zeros(5, CLASSES))
    torch.testing.assert_close(gradient[:, CLASSES:], p[:, CLASSES:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "entropie"}, "inference.objective='entropie' is not known; choose one of entropy, superfluous"),
        ({"images": 0}, "inference.images=0 is neither"),
        ({"images": "all"}, "inference.images='all' is neither"),
        ({"candidate_objective": "entropy"}, "no effect with inference.candidates=1"),
        ({"candidates": 2, "candidate_objective": "x"}, "inference.candidate_objective='x' is not known"),
        ({"candidates": 0}, "inference.candidates=0 must be an integer of at least 1"),
        ({"layers": []}, "inference.layers=.. is neither all"),
        ({"layers": "last"}, "inference.layers='last' is neither all, nor first, nor a list of patterns"),
        ({"temperature": 2.0}, "no effect with inference.objective=superfluous"),
        ({"objective": "entropy", "temperature": 0.0}, "must be positive"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        OneShot(**options)


@pytest.mark.parametrize("images", ["batch", "each"])
def test_a_gradient_is_taken_outside_of_inference_mode_where_some_versions_return_zeros(images, monkeypatch):
    method = random_method(3)
    method.eval()
    modes = []
    superposed = method.superposed

    def noted(coefficients=None):
        modes.append(torch.is_inference_mode_enabled())
        return superposed(coefficients)

    monkeypatch.setattr(method, "superposed", noted)
    inference = OneShot("entropy", images=images)
    outside = inference(method, random_images(6), 10)
    with torch.inference_mode():
        found = inference(method, random_images(6), 10)
        gain = confidence_gain(method, random_images(6), 10, entropy)
    assert torch.equal(found, outside)
    assert not any(modes)
    assert gain.abs().min() > 0


@pytest.mark.parametrize("images", [1, "each"])
def test_a_baseline_is_what_noise_gives_each_task(images):
    method, batch = random_method(5), random_images(6)
    noise = torch.randn(64, *batch.shape[1:], generator=torch.Generator().manual_seed(0))
    baseline = confidence_gain(method, noise, CLASSES, superfluous)
    found = OneShot("superfluous", images=images, baseline="noise")(method, batch, CLASSES)
    for row, image in enumerate(batch.split(1)):
        deciding = image if images == "each" else batch[:1]
        gain = confidence_gain(method, deciding, CLASSES, superfluous)
        assert found[row] == method.tasks[(gain - baseline).argmax()]
    evidence = OneShot("superfluous", baseline="noise").evidence(method, batch[:1], CLASSES)
    torch.testing.assert_close(evidence, confidence_gain(method, batch[:1], CLASSES, superfluous) - baseline)


def test_a_baseline_is_refused_for_what_is_no_image():
    with pytest.raises(ConfigurationError, match=r"inference.baseline='mean'"):
        OneShot(baseline="mean")
    with pytest.raises(ConfigurationError, match=r"inference.baseline=noise takes images.*torch.int64"):
        OneShot(baseline="noise").evidence(random_method(2), torch.zeros(1, 1, 8, 8, dtype=torch.int64), CLASSES)
