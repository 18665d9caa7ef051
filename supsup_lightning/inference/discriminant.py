"""Task inference by a linear discriminant over frozen features: one matrix product, whatever the number of tasks.

phi(x): frozen features; from their sums over the training images of each class, log p(c | x) (`linear_discriminant`)
task = argmax_t log p(t | x),   log p(t | x) = log-sum-exp of log p(c | x) over the classes of t

Streaming linear discriminant analysis (Hayes and Kanan 2020) over random features, as in RanDumb (Prabhu et al. 2024).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning.errors import ConfigurationError, check_choice, check_whole
from supsup_lightning.gate import Gate
from supsup_lightning.gate.gate import NAMERS, both
from supsup_lightning.gate.linear_discriminant import LinearDiscriminant
from supsup_lightning.inference import mask_weight as weighing
from supsup_lightning.inference.consistency import NAME, consistency
from supsup_lightning.inference.inference import Inference, check_images
from supsup_lightning.inference.objectives import check_superfluous, make_objective
from supsup_lightning.inference.one_shot import confidence_gain, confidence_gain_each
from supsup_lightning.inference.shortlist import best, objective_where
from supsup_lightning.methods import Method
from supsup_lightning.methods.protocols import Superposes, require

_NAMED_BY = ("gate", "masks", "gradient")


class Discriminant(Inference):
    """The task with the highest posterior under a linear discriminant over frozen features.

    Args:
        features: ``hidden`` (of the frozen, unmasked network), ``projection``, ``convolution``, ``pretrained``, or a
            module of your own from images to ``(batch, features)``; ``auto`` decides by the inputs.
        num_features: of ``projection`` and ``convolution``; by default 1024 and 2304. A file grows with its square.
        per_task: a covariance matrix per task in place of one for all: for tasks that differ in how their classes
            vary, as rotations do. Costs as many times the bytes.
        regularisation: ``lambda``: share of the mean variance that is added to each feature's; ``auto`` takes it from
            the sums (`linear_discriminant.shrinkage`).
        images: how many images decide, as in `ConfidenceInference`; the log posteriors of several are added.
        classes: who names the class once the task is found: its ``mask``, the ``discriminant``, ``both`` (the mean of
            their log probabilities), or ``auto``, the best of these on the task's own validation images.
        unknown: share of each task's own inputs that may be taken for unknown, 0.05 for example. Inputs further away
            from the nearest class than all but this share of the task's validation images get task -1 and label -1.
            None: every input belongs to a task.
        unknown_distance: how far is measured: ``absolute``; or ``relative``, less the distance from the mean of all
            images by their overall covariance (Ren et al. 2021). ``relative`` is to be given in training.

    Raises:
        ConfigurationError: an option that is unknown or out of its range.

    Example:
        >>> Discriminant("projection", num_features=512).images
        'each'
    """

    finds_task = True
    evidence_name = "log_posterior"

    def __init__(
        self,
        features: str | nn.Module = "auto",
        *,
        num_features: int | None = None,
        per_task: bool = False,
        regularisation: float | str = "auto",
        images: int | str = "each",
        classes: str = "auto",
        candidates: int = 1,
        candidates_by: str = "gate",
        objective: str | None = None,
        mask_weight: float | str | None = None,
        unknown: float | None = None,
        unknown_distance: str = "absolute",
    ) -> None:
        if num_features is not None:
            num_features = check_whole("inference.num_features", num_features)
        check_choice("inference.classes", classes, (*NAMERS, "auto"))
        check_choice("inference.per_task", per_task, (True, False))
        number = isinstance(regularisation, (int, float)) and not isinstance(regularisation, bool)
        if regularisation != "auto" and not (number and 0 <= float(regularisation) < float("inf")):
            raise ConfigurationError(
                f"inference.regularisation={regularisation!r} is neither a number from 0 on, nor auto."
            )
        self.images = check_images(images)
        if unknown is not None:
            if isinstance(unknown, bool) or not isinstance(unknown, (int, float)) or not 0 < unknown < 1:
                raise ConfigurationError(
                    f"inference.unknown={unknown!r} is a share of known inputs; it lies between 0 and 1, or is null."
                )
            if self.images != "each":
                raise ConfigurationError(
                    f"inference.unknown={unknown} judges every image by itself; use inference.images=each with it, not "
                    f"{images}."
                )
        check_choice("inference.unknown_distance", unknown_distance, ("absolute", "relative"))
        if unknown_distance == "relative" and unknown is None:
            raise ConfigurationError(
                "inference.unknown_distance=relative has no effect with inference.unknown=null, where no input is "
                "unknown; leave it out, or set that, to 0.05 for example."
            )
        self.relative = unknown_distance == "relative"
        self.classes = classes
        self.candidates = check_whole("inference.candidates", candidates)
        check_choice("inference.candidates_by", candidates_by, _NAMED_BY)
        self.candidates_by = candidates_by
        self._check_candidates(objective)
        self.name = "entropy" if objective is None else objective
        self.objective = make_objective(self.name, others=(NAME,)) if self.name != NAME else consistency
        self.mask_weight = self._checked_weight(mask_weight)
        self.unknown = unknown
        options = {"inference.unknown": unknown, "inference.mask_weight": mask_weight}
        self.measured_options = tuple(name for name, value in options.items() if value is not None)
        self.finds_unknown = unknown is not None
        self.asks_single_images = self.images in (1, "each")
        self._options: dict[str, Any] = {
            "kind": features,
            "num_features": num_features,
            "per_task": per_task,
            "regularisation": "auto" if regularisation == "auto" else float(regularisation),
        }

    def _check_candidates(self, objective: str | None) -> None:
        given = {"candidates_by": None if self.candidates_by == "gate" else self.candidates_by, "objective": objective}
        for option, value in given.items():
            if self.candidates == 1 and value is not None:
                raise ConfigurationError(
                    f"inference.{option}={value} has no effect with inference.candidates=1, where the discriminant "
                    "decides alone; leave it out, or raise that."
                )
        if self.candidates_by == "gradient":
            self.needs, self.superimposes = Superposes, True

    def _checked_weight(self, weight: float | str | None) -> float | str | None:
        if weight is None or weight == "auto":
            number: float | str | None = weight
        elif isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 <= float(weight) < float("inf"):
            number = float(weight)
        else:
            raise ConfigurationError(
                f"inference.mask_weight={weight!r} is neither a number from 0 on, nor auto, nor null."
            )
        if weight is not None and self.candidates == 1:
            raise ConfigurationError(
                f"inference.mask_weight={weight} has no effect with inference.candidates=1, where no mask is tried; "
                "leave it out, or raise that."
            )
        if weight is not None and self.candidates_by != "gate":
            raise ConfigurationError(
                f"inference.mask_weight={weight} needs inference.candidates_by=gate: where it is "
                f"{self.candidates_by}, the posterior decides."
            )
        return number

    def measure(self, method: Method, batches: Iterable[tuple[Tensor, Tensor]], *, task: int, num_classes: int) -> None:
        """Measure what ``mask_weight`` needs of a finished task on its own validation images, if that is given.

        Args:
            method: in evaluation mode.
            batches: of ``(images, labels)``.
            task: the task, of which the gate has sums.
            num_classes: of the task with most of them.

        Raises:
            ConfigurationError: there is no image.
        """
        if self.mask_weight is not None:
            weighing.measure(
                self._gate_of(method),
                method,
                batches,
                task=task,
                num_classes=num_classes,
                name=self.name,
                objective=self.objective,
                candidates=self.candidates,
            )

    @property
    def objectives(self) -> dict[str, str]:
        """Name of the objective in use, by option; empty if masks have no part in finding tasks."""
        return {} if self.candidates == 1 else {"inference.objective": self.name}

    def check(self, *, output_size: int, num_classes: int, layers: Sequence[str] = ()) -> None:
        """Raise `ConfigurationError` if the objective needs superfluous outputs and the network has none."""
        check_superfluous("inference", self.name, output_size=output_size, num_classes=num_classes)

    def give_gate(self, method: Method) -> None:
        """Give the method a gate without sums; or let the one that it has follow these options.

        Raises:
            MismatchError: it has sums over other features.
        """
        if method.gate is None:
            method.gate = Gate(**self._options)
        method.gate.follow(self._options)

    def __call__(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """The task of each image: ``(batch, *shape)`` to ``(batch,)`` int64."""
        gate = self._gate_of(method)
        discriminant = gate.discriminant(method.tasks)
        features = gate.features(method, images)
        places = self._decide(method, images, num_classes, discriminant.log_posterior_of_tasks(features))
        return method.tasks[places].masked_fill(self._is_unknown(method, features, places), -1)

    @torch.no_grad()
    def predict(self, method: Method, images: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Task ``(batch,)`` int64, and under it logits or log posteriors of the classes, ``(batch, num_classes)``.

        The task of an unknown input is -1, where these are asked for.
        """
        gate = self._gate_of(method)
        discriminant = gate.discriminant(method.tasks)
        if not len(images):
            return images.new_empty(0, dtype=torch.int64), images.new_empty(0, num_classes, dtype=torch.float32)
        features = gate.features(method, images)
        log_posterior = discriminant.log_posterior(features)
        places = self._decide(method, images, num_classes, discriminant.of_tasks(log_posterior))
        logits = log_posterior.new_empty(len(images), num_classes)
        for place in places.unique().tolist():
            own, task = places == place, int(method.tasks[place])
            namer = gate.best_namer(task) if self.classes == "auto" else self.classes
            if namer != "discriminant":
                named = by_mask = method(images[own], task)[:, :num_classes]
            if namer != "mask":
                named = discriminant.of_classes(log_posterior[own], place, num_classes)
            if namer == "both":
                named = both(by_mask, named)
            logits[own] = named.to(logits)
        return method.tasks[places].masked_fill(self._is_unknown(method, features, places), -1), logits

    def evidence(self, method: Method, images: Tensor, num_classes: int) -> Tensor:
        """Log posterior of each task for these images, all of one task."""
        gate = self._gate_of(method)
        discriminant = gate.discriminant(method.tasks)
        return _together(discriminant, discriminant.log_posterior_of_tasks(gate.features(method, images)))

    def _is_unknown(self, method: Method, features: Tensor, places: Tensor) -> Tensor:
        """Whether each image is further away from all classes than images of its task are, ``(batch,)`` bool."""
        if self.unknown is None:
            return torch.zeros_like(places, dtype=torch.bool)
        gate = self._gate_of(method)
        furthest = gate.furthest(method.tasks, refused=self.unknown, relative=self.relative)
        discriminant = gate.discriminant(method.tasks)
        distances = discriminant.relative_distances if self.relative else discriminant.distances
        return distances(features).amin(1) > furthest.to(features)[places]

    def _decide(self, method: Method, images: Tensor, num_classes: int, log_posterior: Tensor) -> Tensor:
        """Place of the task of each image, ``(batch,)``, from ``log p(t | x)`` ``(batch, k)``."""
        deciding = images
        if self.images != "each":
            number = len(images) if self.images == "batch" else int(self.images)
            discriminant = self._gate_of(method).discriminant(method.tasks)
            log_posterior = _together(discriminant, log_posterior[:number]).unsqueeze(0)
            deciding = images[:number]
        weight = self.mask_weight
        if weight is not None:
            gate = self._gate_of(method)
            weight = weighing.chosen_weight(gate, method.tasks, name=self.name, asked=weight)
        if self.candidates > 1 and weight != 0:
            # As in `ConfidenceInference`: differences between tasks are small next to bfloat16's steps.
            with torch.autocast(images.device.type, enabled=False):
                deciding = deciding.float() if deciding.is_floating_point() else deciding
                log_posterior = self._among_candidates(method, deciding, num_classes, log_posterior, weight)
        return log_posterior.argmax(1).expand(len(images))

    def _among_candidates(
        self, method: Method, images: Tensor, num_classes: int, log_posterior: Tensor, weight: float | None
    ) -> Tensor:
        """Scores of the tasks that are tried, ``(rows, k)``, and minus infinity for others.

        Args:
            method: with ``k`` finished tasks.
            images: that decide.
            num_classes: of the task with most of them.
            log_posterior: ``(rows, k)``, a row per image, or one for all.
            weight: of the masks beside the posterior; None: they decide alone.
        """
        if self.candidates_by == "gate":
            chosen = best(log_posterior, self.candidates)
            values = objective_where(chosen, method, images, num_classes, self.objective)
            if weight is None:
                return -values
            each = len(images) / len(log_posterior)  # of several images, posteriors and scores are both added
            return weighing.summed(self._gate_of(method), method.tasks, log_posterior, values, chosen, weight * each)
        if self.candidates_by == "masks":
            everyone = torch.ones_like(log_posterior, dtype=torch.bool)
            first = -objective_where(everyone, method, images, num_classes, self.objective)
        elif self.images == "each":
            first = confidence_gain_each(require(method, Superposes), images, num_classes, self.objective)
        else:
            first = confidence_gain(require(method, Superposes), images, num_classes, self.objective).unsqueeze(0)
        return log_posterior.masked_fill(~best(first, self.candidates), -torch.inf)

    def _gate_of(self, method: Method) -> Gate:
        if method.gate is None:
            raise ConfigurationError(
                "inference=discriminant needs the gate's sums, which `ContinualModule` gives to its method; make the "
                "module with this inference before it is trained."
            )
        method.gate.follow(self._options)
        return method.gate


def _together(discriminant: LinearDiscriminant, log_posterior: Tensor) -> Tensor:
    """``log p(t | all images)`` but for a constant, ``(k,)``, of images of one task: ``(batch, k)`` each by itself."""
    prior = discriminant.log_prior_of_tasks()
    return (log_posterior - prior).sum(0) + prior
