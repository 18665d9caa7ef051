import pytest
import torch
from torch import nn

from supsup_lightning import (
    GG,
    PSP,
    Binary,
    Exhaustive,
    Given,
    OneShot,
    PermutedDigits,
    SupSup,
    Unannounced,
)
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.inference.consistency import consistency, measure
from supsup_lightning.inference.one_shot import confidence_gain, confidence_gain_each
from supsup_lightning.methods.transforms import check_transforms, copies, make_transforms
from supsup_lightning.scenario import NNS
from tests.conftest import StopAfter, digits_lenet, fit, random_images, random_method

CLASSES = 5


def turned(image, quarters):
    """An image ``(1, side, side)`` turned pixel by pixel: (row, column) goes to (side - 1 - column, row)."""
    for _ in range(quarters):
        side, other = image.shape[1], torch.empty_like(image)
        for row in range(side):
            for column in range(side):
                other[:, side - 1 - column, row] = image[:, row, column]
        image = other
    return image


def slow_score(method, image, task):
    """Mean over the four rotations of the largest logit of the rotation's block."""
    total = 0.0
    for quarters in range(4):
        logits = method(turned(image, quarters).unsqueeze(0), task)[0].tolist()
        total += max(logits[quarters * CLASSES + label] for label in range(CLASSES))
    return total / 4


def test_copies_are_each_image_under_each_rotation_with_its_own_output():
    images, labels = random_images(6).view(2, 3, 1, 8, 8), torch.tensor([[0, 1, 4], [2, 2, 3]])
    many, outputs = copies(images, labels, make_transforms("rotations"), num_classes=CLASSES)
    assert many.shape == (2, 12, 1, 8, 8)
    for task in range(2):
        for quarters in range(4):
            for place in range(3):
                assert torch.equal(many[task, 3 * quarters + place], turned(images[task, place], quarters))
                assert outputs[task, 3 * quarters + place] == quarters * CLASSES + labels[task, place]


def test_functions_of_images_take_the_place_of_rotations():
    images, labels = random_images(2).unsqueeze(0), torch.tensor([[0, 1]])
    many, outputs = copies(images, labels, make_transforms([torch.neg]), num_classes=2)
    assert torch.equal(many, torch.cat([images, -images], 1))
    assert outputs.tolist() == [[0, 1, 2, 3]]


@torch.no_grad()
def test_exhaustive_equals_a_slow_search_by_standardised_scores():
    method, own, images = random_method(4, superfluous="rotations").eval(), random_images(9), random_images(20, seed=1)
    labels = torch.zeros(9, dtype=torch.int64)
    scores = []
    for task in range(4):
        measure(method, [(own[:5], labels[:5]), (own[5:], labels[5:])], task=task, num_classes=CLASSES)
        known = torch.tensor([slow_score(method, image, task) for image in own], dtype=torch.float64)
        found = torch.tensor([slow_score(method, image, task) for image in images], dtype=torch.float64)
        assert method.standardisation(task) == pytest.approx((-known.mean().item(), known.std(correction=0).item()))
        scores.append((found - known.mean()) / known.std(correction=0))
    scores = torch.stack(scores)
    each = Exhaustive("consistency", images="each")
    assert torch.equal(each(method, images, CLASSES), scores.argmax(0))
    together = Exhaustive("consistency", images="batch")
    assert together(method, images, CLASSES).unique().item() == scores.mean(1).argmax()
    for inference in (OneShot, Binary):  # with all tasks as candidates the gradient decides nothing
        tried = inference("superfluous", candidates=4, candidate_objective="consistency", images="each")
        assert torch.equal(tried(method, images, CLASSES), scores.argmax(0))
    assert len(scores.argmax(0).unique()) > 1


def test_images_that_are_all_alike_have_no_spread_to_divide_by():
    method, image = random_method(1, superfluous="rotations").eval(), random_images(1)
    measure(method, [(image.repeat(4, 1, 1, 1), torch.zeros(4))], task=0, num_classes=CLASSES)
    assert method.standardisation(0)[1] == pytest.approx(1e-3)
    with pytest.raises(ConfigurationError, match="Task 0 has no validation image"):
        measure(method, [], task=0, num_classes=CLASSES)


def test_the_gradient_equals_autograd_through_stacked_masks():
    method, images = random_method(3, superfluous="rotations"), random_images(5)
    masks = torch.stack([method.bank.get(task).float() for task in range(3)])
    coefficients = torch.full((3,), 1 / 3, requires_grad=True)
    parameters = method.layout.split((coefficients @ masks) * method.frozen)
    value = torch.tensor(0.0)
    for image in images:
        for quarters in range(4):
            copy = turned(image, quarters).unsqueeze(0)
            logits = torch.func.functional_call(method.network, parameters, (copy,))[0]
            value = value - logits[quarters * CLASSES : (quarters + 1) * CLASSES].max() / 20
    (gradient,) = torch.autograd.grad(value, coefficients)
    gain = confidence_gain(method, images, CLASSES, consistency)
    torch.testing.assert_close(gain, -gradient, rtol=1e-4, atol=1e-5)
    each = confidence_gain_each(method, images, CLASSES, consistency)
    torch.testing.assert_close(each.mean(0), gain, rtol=1e-4, atol=1e-5)


# Training, and what is kept.


def digits_of(**options):
    return PermutedDigits(num_tasks=2, steps_per_task=20, **options)


def rotating(**options):
    return digits_lenet(superfluous="rotations", **options)


def state(method):
    return {name: value for name, value in method.bank.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    by = {"inference": Exhaustive("consistency", images="each")}
    return fit(rotating(), digits_of(), folder=tmp_path_factory.mktemp("whole"), **by)[0]


def test_a_resumed_run_has_the_same_standardisation(whole, tmp_path):
    by = {"inference": Exhaustive("consistency", images="each")}
    fit(rotating(), digits_of(), folder=tmp_path, callbacks=[StopAfter(0, tmp_path / "a.ckpt")], **by)
    resumed, _ = fit(rotating(), digits_of(), folder=tmp_path, checkpoint=tmp_path / "a.ckpt", **by)
    assert_same(state(resumed.method), state(whole.method))
    assert all(spread > 1e-3 for _, spread in map(whole.method.standardisation, range(2)))


def test_tasks_trained_at_once_have_the_masks_of_tasks_trained_one_by_one(whole, tmp_path):
    by = {"inference": Exhaustive("consistency", images="each")}
    together, _ = fit(rotating(), digits_of(tasks_at_once=2), folder=tmp_path, **by)
    same = (together.method.bank.packed == whole.method.bank.packed).float().mean()
    assert same > 0.99  # up to rounding
    torch.testing.assert_close(
        together.method.bank.standardisation, whole.method.bank.standardisation, rtol=1e-2, atol=1e-2
    )


def test_the_file_of_a_bank_has_it_and_merges_it(whole, tmp_path):
    whole.method.save(tmp_path / "both.safetensors")
    loaded = rotating()
    loaded.load(tmp_path / "both.safetensors")
    assert_same(state(loaded), state(whole.method))
    parts = []
    for task in range(2):
        part = rotating()
        part.load(tmp_path / "both.safetensors")
        part.bank.remove(1 - task)
        parts.append(tmp_path / f"{task}.safetensors")
        part.save(parts[-1])
    merged = rotating()
    for path in parts:
        merged.merge(path)
    merged.merge(parts[0])  # the same again changes nothing
    assert_same(state(merged), state(whole.method))
    merged.standardise(0, 1.0, 2.0)
    with pytest.raises(KeyError, match="different masks"):
        merged.merge(parts[0])


def test_idle_outputs_leave_states_and_files_as_they_were(whole, tmp_path):
    idle = digits_lenet()
    assert "standardisation" not in idle.bank.state_dict()
    assert "superfluous" not in idle.identity
    idle.begin_task(0)
    idle.finish_task(0)
    idle.save(tmp_path / "idle.safetensors")
    with pytest.raises(MismatchError, match="superfluous None there, 'rotations' here"):
        rotating().load(tmp_path / "idle.safetensors")


# Refusals, all before training.


@pytest.mark.parametrize("option", ["turned", [], [1], 3])
def test_an_unknown_option_is_refused(option):
    with pytest.raises(ConfigurationError, match=r"method\.superfluous=.* is neither idle, nor rotations"):
        digits_lenet(superfluous=option)


def test_too_few_outputs_are_refused_with_both_numbers(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 39, bias=False))
    with pytest.raises(ConfigurationError, match=r"output_size=39 is smaller than 40: .* to at least 40"):
        fit(SupSup(network, superfluous="rotations"), digits_of(), folder=tmp_path, inference=Given(), scenario=GG)


@pytest.mark.parametrize("shape", [(1, 8, 6), (64,), (8, 8)])
def test_inputs_that_cannot_be_turned_are_refused(shape):
    method = rotating()
    with pytest.raises(ConfigurationError, match="needs square images"):
        check_transforms("rotations", method.transforms, torch.zeros(2, *shape), output_size=100, num_classes=2)
    shorter = (lambda images: images[..., :-1],)
    with pytest.raises(ConfigurationError, match="has to keep shape and type"):
        check_transforms([*shorter], shorter, torch.zeros(2, *shape), output_size=100, num_classes=2)


def test_objective_and_method_have_to_fit_one_another(tmp_path):
    by = {"folder": tmp_path}
    with pytest.raises(ConfigurationError, match=r"objective=consistency .* add method\.superfluous=rotations"):
        fit(digits_lenet(), digits_of(), inference=Exhaustive("consistency"), **by)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 20, bias=False))
    with pytest.raises(ConfigurationError, match=r"method=supsup"):
        fit(PSP(network), digits_of(), inference=Exhaustive("consistency"), **by)
    with pytest.raises(ConfigurationError, match=r"objective=superfluous takes outputs .* for idle ones"):
        fit(rotating(), digits_of(), inference=OneShot(), **by)
    inference = OneShot("entropy", candidates=2, candidate_objective="superfluous")
    with pytest.raises(ConfigurationError, match=r"candidate_objective=superfluous takes outputs"):
        fit(rotating(), digits_of(), inference=inference, **by)
    with pytest.raises(ConfigurationError, match=r"temperature=2\.0 has no effect with inference\.objective=consist"):
        Exhaustive("consistency", temperature=2.0)


def test_a_task_without_validation_images_is_refused(tmp_path):
    data = digits_of()
    data.val_loader = lambda task: []  # as a LightningDataModule without a validation loader
    with pytest.raises(ConfigurationError, match=r"task 0 has none; raise data\.validation_share"):
        fit(rotating(), data, folder=tmp_path, inference=Given(), scenario=GG)


def test_streams_that_announce_no_task_are_refused(tmp_path):
    data = Unannounced(PermutedDigits(num_tasks=2, steps_per_task=20))
    with pytest.raises(ConfigurationError, match=r"scenario=nns does not tell when"):
        fit(rotating(), data, folder=tmp_path, scenario=NNS, inference=OneShot("entropy"))


def test_the_parts_of_a_task_add_up_to_its_bytes():
    method = digits_lenet(superfluous="rotations")
    assert -(-sum(part.task_bytes for part in method.parts()) // 1) == method.task_bytes()
