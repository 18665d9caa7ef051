"""Posteriors and distances from sums, against densities that are written out."""

import pytest
import torch
from sklearn.covariance import oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.distributions import MultivariateNormal

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant, shrinkage
from tests.test_class_sums import _images, _sums


@pytest.mark.parametrize("per_task", [False, True])
def test_posteriors_are_those_of_normal_densities(per_task):
    # Unequal numbers of images and of classes: 40 images of 2 classes, 90 of 3, 10 of 1.
    parts = [(task, *_images(number, classes=classes, seed=task)) for task, number, classes in _TASKS]
    sums = _sums(parts, per_task=per_task)
    discriminant = LinearDiscriminant(sums, torch.tensor([8, 3, 5]), regularisation=0.1)
    points = torch.cat([features[:7] for _, features, _ in parts])
    logs = []
    for row in range(len(sums)):
        task = int(sums.tasks[row])
        number = sums.counts[sums.tasks == task].sum() if per_task else sums.counts.sum()
        covariance = sums.scatter(task) / number
        covariance = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(6)
        density = MultivariateNormal(sums.means[row], covariance)
        logs.append(density.log_prob(points.double()) + (sums.counts[row] / sums.counts.sum()).log())
    expected = torch.stack(logs, 1).log_softmax(1)
    found = discriminant.log_posterior(points)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    by_task = torch.stack([expected[:, sums.tasks == task].logsumexp(1) for task in (8, 3, 5)], 1)
    torch.testing.assert_close(discriminant.of_tasks(found).double(), by_task, rtol=1e-4, atol=1e-3)
    prior = torch.tensor([40, 90, 10]) / 140
    torch.testing.assert_close(discriminant.log_prior_of_tasks(), prior.log())


def test_it_classifies_as_scikit_learn_does():
    features, labels = _images(300, classes=4, seed=5)
    discriminant = LinearDiscriminant(_sums([(0, features, labels)]), torch.tensor([0]), regularisation=1e-9)
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(features.numpy(), labels.numpy())
    found = discriminant.log_posterior(features).exp()
    torch.testing.assert_close(
        found, torch.tensor(reference.predict_proba(features.numpy())).float(), atol=1e-3, rtol=0
    )


def test_far_away_posteriors_keep_their_order():
    """Posteriors that underflow are still compared: an image far from all tasks has a nearest one."""
    sums = _sums(
        [(task, 1000.0 * task + _images(30, classes=2, seed=task)[0], torch.arange(30) % 2) for task in range(3)]
    )
    discriminant = LinearDiscriminant(sums, torch.arange(3), regularisation=1e-3)
    log_posterior = discriminant.log_posterior_of_tasks(torch.full((1, 6), 1e5))
    assert log_posterior.isfinite().all()
    assert log_posterior.argmax() == 2


def test_distances_are_mahalanobis():
    sums = _sums([(0, *_images(90, classes=3))])
    discriminant = LinearDiscriminant(sums, torch.tensor([0]), regularisation=0.05)
    points = _images(5, classes=1, seed=9)[0].double()
    covariance = sums.scatter(0) / 90
    inverse = (covariance + 0.05 * covariance.diagonal().mean() * torch.eye(6)).inverse()
    apart = points.unsqueeze(1) - sums.means  # (5, 3, 6)
    expected = torch.einsum("bci,ij,bcj->bc", apart, inverse, apart)
    torch.testing.assert_close(discriminant.distances(points.float()).double(), expected, rtol=1e-3, atol=1e-3)
    assert discriminant.mean_distances() == pytest.approx([float((inverse @ covariance).trace())], rel=1e-5)


def test_one_image_per_class_is_the_nearest_mean():
    features = torch.eye(6)[:3]
    discriminant = LinearDiscriminant(_sums([(0, features, torch.arange(3))]), torch.tensor([0]), regularisation=1e-3)
    assert discriminant.log_posterior(features).argmax(1).tolist() == [0, 1, 2]


def test_unknown_tasks_and_no_regularisation_are_refused():
    sums = _sums([(0, *_images(4, classes=2))])
    with pytest.raises(ConfigurationError, match="no sums of the finished task 7"):
        LinearDiscriminant(sums, torch.tensor([0, 7]), regularisation=1e-3)
    with pytest.raises(ConfigurationError, match=r"inference.regularisation=0.0 is too small"):
        LinearDiscriminant(sums, torch.tensor([0]), regularisation=0.0)


_TASKS = ((8, 40, 2), (3, 90, 3), (5, 10, 1))


def test_shrinkage_is_scikit_learns():
    features = _images(50, classes=1, seed=4)[0].double()
    centred = features - features.mean(0)
    found = shrinkage(centred.T @ centred / len(features), len(features))
    rho = oas(features.numpy())[1]
    assert found == pytest.approx(rho / (1 - rho), rel=1e-6)
    assert shrinkage(torch.zeros(3, 3), 10) == 1
