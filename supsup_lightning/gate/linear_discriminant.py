"""Linear discriminant analysis from sums: log posteriors of classes and tasks, and Mahalanobis distances.

Sigma = scatter / N;   A = Sigma + lambda (tr Sigma / features) I;   lambda by the oracle approximating shrinkage
log p(phi | c) = -(phi - mu_c)' A^-1 (phi - mu_c) / 2 - log det(A) / 2 + const;   p(c) = n_c / N
log p(t | phi) = log-sum-exp of log p(c | phi) over the classes c of the task t

With a matrix per task, ``Sigma`` and ``A`` are the task's own.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from supsup_lightning.errors import ConfigurationError
from supsup_lightning.gate.class_sums import ClassSums


@dataclass(frozen=True, eq=False)
class Covariance:
    """A regularised covariance matrix, and the classes that it applies to.

    Attributes:
        classes: places of the classes among all, ``(classes,)`` int64.
        centre: a point from which features are taken, for precision, ``(features,)``.
        whitened_means: ``L^-1 mu_c``, ``(classes, features)``.
        weights: ``A^-1 mu_c``, ``(classes, features)``.
        biases: ``-mu_c' A^-1 mu_c / 2 + log p(c) - log det(A) / 2``, ``(classes,)``.
        factor: the lower triangular ``L`` of ``A = L L'``, ``(features, features)``.
        ridge: what ``A`` has more than ``Sigma`` on its diagonal.
    """

    classes: Tensor
    centre: Tensor
    whitened_means: Tensor
    weights: Tensor
    biases: Tensor
    factor: Tensor
    ridge: float

    @cached_property
    def mean_distance(self) -> float:
        """Mean squared distance of the images: ``tr(A^-1 Sigma)``."""
        # tr(A^-1 (A - ridge I)); the inverse's trace is the sum of squares of the factor's inverse.
        factor = self.factor.double()
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        return float(len(factor) - self.ridge * inverse.square().sum())

    def whitened(self, points: Tensor) -> Tensor:
        """``L^-1 x`` of points ``(batch, features)`` that are taken from the centre."""
        return torch.linalg.solve_triangular(self.factor, points.T, upper=False).T


class LinearDiscriminant:
    """Posterior of classes and tasks, solved from sums by Cholesky decomposition.

    Args:
        sums: of the classes; those of tasks that are not asked about are left out.
        tasks: the tasks, ``(k,)`` int64, in the order of the answers.
        regularisation: ``lambda``, from 0 on; ``auto`` for `shrinkage`.

    Attributes:
        places: place of each class's task among ``tasks``, ``(classes,)`` int64.
        labels: label of each class, ``(classes,)`` int64.
        counts: number of images of each class, ``(classes,)`` int64.
        covariances: one, or one per task.

    Raises:
        ConfigurationError: a task without sums; a covariance matrix that cannot be inverted.

    >>> from supsup_lightning.gate.class_sums import TaskSums
    >>> sums = ClassSums()
    >>> for task, middle in ((0, -1.0), (1, 1.0)):
    ...     features = middle + torch.tensor([[-0.1], [0.1]])
    ...     sums.add(task, TaskSums.of([(features, torch.zeros(2, dtype=torch.int64))], num_labels=1))
    >>> discriminant = LinearDiscriminant(sums, torch.tensor([0, 1]), regularisation=0.0)
    >>> discriminant.log_posterior_of_tasks(torch.tensor([[0.9]])).argmax(1)
    tensor([1])
    """

    def __init__(self, sums: ClassSums, tasks: Tensor, *, regularisation: float | str) -> None:
        known = torch.isin(tasks, sums.tasks)
        if not known.all():
            without = tasks[~known].tolist()
            raise ConfigurationError(
                f"inference=discriminant: the gate has no sums of the finished task{'s' if len(without) > 1 else ''} "
                f"{', '.join(map(str, without[:10]))}, trained without it; train with "
                "inference=discriminant, or use another inference."
            )
        asked = torch.isin(sums.tasks, tasks).nonzero().flatten()
        position = {task: place for place, task in enumerate(tasks.tolist())}
        self.places = torch.tensor([position[task] for task in sums.tasks[asked].tolist()], device=sums.tasks.device)
        self.labels = sums.labels[asked]
        self.num_tasks = len(tasks)
        self.counts = counts = sums.counts[asked]
        self.log_prior = (counts.double() / counts.sum()).log()
        means = sums.means[asked]
        groups = [asked.new_tensor(range(len(asked)))]
        if sums.per_task:
            groups = [(self.places == place).nonzero().flatten() for place in range(self.num_tasks)]
        self._sums, self._asked, self._regularisation = sums, asked, regularisation
        self.covariances = []
        for group in groups:
            owner = int(tasks[self.places[group[0]]])
            number = sums.scatter_count(owner)
            self.covariances.append(
                _solve(
                    sums.scatter(owner) / number,
                    number,
                    means[group],
                    group,
                    counts=counts[group],
                    log_prior=self.log_prior[group],
                    regularisation=regularisation,
                )
            )

    def log_posterior(self, features: Tensor) -> Tensor:
        """``log p(c | phi)``, ``(batch, features)`` to ``(batch, classes)`` float32."""
        scores = features.new_empty(len(features), len(self.labels), dtype=torch.float32)
        for part in self.covariances:
            centred = features.float() - part.centre
            own = centred @ part.weights.T + part.biases
            if len(self.covariances) > 1:  # else the same for all classes
                own = own - part.whitened(centred).square().sum(1, keepdim=True) / 2
            scores[:, part.classes] = own
        return scores.log_softmax(1)

    def of_tasks(self, log_posterior: Tensor) -> Tensor:
        """From ``log p(c | phi)`` ``(batch, classes)`` to ``log p(t | phi)`` ``(batch, k)``."""
        places = self.places.expand_as(log_posterior)
        highest = log_posterior.new_full((len(log_posterior), self.num_tasks), -torch.inf)
        highest = highest.scatter_reduce(1, places, log_posterior, "amax")
        shares = (log_posterior - highest.gather(1, places)).exp()
        return highest + torch.zeros_like(highest).scatter_add(1, places, shares).log()

    def of_classes(self, log_posterior: Tensor, place: int, num_labels: int) -> Tensor:
        """From ``log p(c | phi)`` to that of one task's labels, ``(batch, num_labels)``; -inf where it has none."""
        own = self.places == place
        by_label = log_posterior.new_full((len(log_posterior), num_labels), -torch.inf)
        by_label[:, self.labels[own]] = log_posterior[:, own]
        return by_label

    def log_posterior_of_tasks(self, features: Tensor) -> Tensor:
        """``log p(t | phi)``, ``(batch, features)`` to ``(batch, k)`` float32."""
        return self.of_tasks(self.log_posterior(features))

    def log_prior_of_tasks(self) -> Tensor:
        """``log p(t)``, ``(k,)``."""
        return self.of_tasks(self.log_prior.float().unsqueeze(0))[0]

    def mean_distances(self) -> list[float]:
        """Mean squared distance of training images from their class, per task: of all, or of the task's own where it
        has a matrix of its own.
        """
        found = [part.mean_distance for part in self.covariances]
        return found if len(found) > 1 else found * self.num_tasks

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distance to each class, ``(batch, features)`` to ``(batch, classes)``."""
        found = features.new_empty(len(features), len(self.labels), dtype=torch.float32)
        for part in self.covariances:
            whitened = part.whitened(features.float() - part.centre)
            found[:, part.classes] = torch.cdist(whitened, part.whitened_means).square()
        return found

    @cached_property
    def overall(self) -> Covariance:
        """Covariance of all images about their common mean: that within classes, and that between their means."""
        sums, counts, means = self._sums, self.counts.double(), self._sums.means[self._asked]
        owners = {int(sums.tasks[place]) for place in self._asked.tolist()}
        owners = owners if sums.per_task else {min(owners)}  # one matrix is that of any task
        number = sum(sums.scatter_count(owner) for owner in owners)
        scatter = torch.stack([sums.scatter(owner) for owner in owners]).sum(0)
        mean = counts @ means / counts.sum()
        apart = means - mean
        return _solve(
            scatter / number + (apart.T * counts) @ apart / counts.sum(),
            number,
            mean.unsqueeze(0),
            counts.new_zeros(1, dtype=torch.int64),
            counts=counts.sum().unsqueeze(0),
            log_prior=counts.new_zeros(1),
            regularisation=self._regularisation,
        )

    def relative_distances(self, features: Tensor) -> Tensor:
        """Squared distance to each class less that to the overall mean, by its covariance, ``(batch, classes)``.

        Relative Mahalanobis distance (Ren et al. 2021): what all images have in common counts less.
        """
        far = self.overall.whitened(features.float() - self.overall.centre).square().sum(1, keepdim=True)
        return self.distances(features) - far

    def expected_relative_distances(self) -> Tensor:
        """Mean of `relative_distances` of each task's images from their own class, ``(k,)``; from the sums alone."""
        factor = self.overall.factor.double()
        centre = self.overall.centre.double()
        ridge = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False).square().sum()
        expected = self.log_prior.new_empty(len(self.labels))
        for part in self.covariances:
            means = self._sums.means[self._asked[part.classes]] - centre
            between = torch.linalg.solve_triangular(factor, means.T, upper=False).square().sum(0)
            within = torch.linalg.solve_triangular(factor, part.factor.double(), upper=False).square().sum()
            expected[part.classes] = part.mean_distance - (within - part.ridge * ridge) - between
        total = expected.new_zeros(2, self.num_tasks)
        total.index_add_(1, self.places, torch.stack([expected, torch.ones_like(expected)]) * self.counts)
        return (total[0] / total[1]).float()


def shrinkage(covariance: Tensor, num_images: int) -> float:
    """``lambda`` of a covariance matrix ``(features, features)``, from its traces alone: OAS (Chen et al. 2010).

    The formula is scikit-learn's. The estimate is ``(1 - rho) S + rho (tr S / features) I``, and a discriminant depends
    on ``rho / (1 - rho)`` alone.

    >>> round(shrinkage(torch.eye(2) + 1, 100), 4)
    0.1477
    """
    size, trace, square = len(covariance), float(covariance.diagonal().sum()), float(covariance.square().sum())
    apart = square - trace**2 / size
    if not apart > 0:  # a multiple of the identity, or zero: nothing to shrink
        return 1.0
    rho = min((square + trace**2) / ((num_images + 1) * apart), 0.999)
    return rho / (1 - rho)


def _solve(
    covariance: Tensor,
    num_images: int,
    means: Tensor,
    classes: Tensor,
    *,
    counts: Tensor,
    log_prior: Tensor,
    regularisation: float | str,
) -> Covariance:
    size = len(covariance)
    share = shrinkage(covariance, num_images) if isinstance(regularisation, str) else regularisation
    ridge = share * covariance.diagonal().mean()
    if not ridge > 0 and not covariance.any():  # one image per class: nothing but the means is known
        ridge = ridge.new_tensor(1.0)
    regularised = covariance + ridge * torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    factor, failed = torch.linalg.cholesky_ex(regularised)
    if failed:
        raise ConfigurationError(
            f"inference.regularisation={regularisation} is too small for the covariance of {size} features to be "
            "inverted; use auto, or 1e-3, or more where there are few images."
        )
    centre = counts.double() @ means / counts.sum()
    whitened = torch.linalg.solve_triangular(factor, (means - centre).T, upper=False)  # (features, classes)
    weights = torch.linalg.solve_triangular(factor.T, whitened, upper=True).T
    biases = -whitened.square().sum(0) / 2 + log_prior - factor.diagonal().log().sum()
    return Covariance(
        classes, centre.float(), whitened.T.float(), weights.float(), biases.float(), factor.float(), float(ridge)
    )
