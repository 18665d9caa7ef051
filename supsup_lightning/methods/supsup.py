"""SupSup: a task is a binary mask over the frozen weights of one network (section 3 of the paper)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from supsup_lightning.bank import MaskBank, codec
from supsup_lightning.bank.combinations import Combinations
from supsup_lightning.bank.finished_masks import FinishedMasks, check_combined
from supsup_lightning.bank.layer_statistics import LayerStatistics, layer_statistics
from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.layout import ByName, Layout
from supsup_lightning.masks import MaskOptions
from supsup_lightning.methods.frozen_network import FrozenNetworkMethod, mask_options
from supsup_lightning.methods.kept_scores import KeptScores
from supsup_lightning.methods.method import Part
from supsup_lightning.methods.sparsity_search import SparsitySearch
from supsup_lightning.methods.starting_scores import StartingScores
from supsup_lightning.methods.transforms import Option, described, make_transforms
from supsup_lightning.recipe.recorded import recorded

logger = logging.getLogger(__name__)


@recorded
class SupSup(FrozenNetworkMethod):
    """One frozen network and one mask per task, with running statistics of normalisation layers per task.

    A superposition belongs to no task, so it is normalised by the statistics of the batch at hand. A task may also be
    a linear combination of the masks of others (`begin_combination`).

    Args:
        network: any module. Its masked weights are overwritten with random ones (``weights``); none is trained.
        mask: options of masks; or give its options as keywords, ``SupSup(network, rule="topk", sparsity=0.9)``. By
            default, parameters of two or more dimensions are masked.
        weights: the base weights: ``signed_constant`` or ``kaiming_normal``, regrown from the seed; ``keep`` leaves the
            network's own (pretrained, say).
        store_weights: put the masked weights into checkpoints and bank files, too. Otherwise these hold a checksum
            that refuses other weights. Parameters that are not masked (biases, say) are small and always stored.
        superfluous: what outputs beyond the classes learn: ``idle``, to stay low; ``rotations``, the classes of images
            turned by 90, 180 and 270 degrees, for ``inference.objective=consistency``; or functions of images
            ``(batch, *shape)`` whose copies they learn.
        compile: training steps call the network through `torch.compile`; needs a C++ compiler (docs/speed.md).
        seed: of weights and scores.

    Attributes:
        bank: the finished masks.
        combinations: the finished tasks that are linear combinations of masks.

    Raises:
        ConfigurationError: an option out of its range, or a network without a weight to mask.

    >>> import torch
    >>> method = SupSup(nn.Linear(4, 2, bias=False))
    >>> method.begin_task(0)
    >>> method(torch.ones(1, 4), 0).shape
    torch.Size([1, 2])
    >>> method.finish_task(0)
    >>> len(method.bank), method.task_bytes()
    (1, 1)
    """

    file_format = codec.MASK_BANK
    mask_options = tuple(field.name for field in fields(MaskOptions))

    def __init__(
        self,
        network: nn.Module,
        *,
        mask: MaskOptions | None = None,
        weights: str = "signed_constant",
        store_weights: bool = False,
        superfluous: Option = "idle",
        compile: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        mask = mask_options(mask, options)
        layout = Layout.of(network, mask.is_masked or ByName())
        search = None
        if mask.searches:
            search = SparsitySearch(
                mask.search_candidates,
                tolerance=mask.search_tolerance,
                num_weights=layout.num_weights,
                num_statistics=Layout.of_running_statistics(network).num_weights,
            )
        super().__init__(
            network,
            layout=layout,
            drawn=layout,
            mask=mask,
            sparsity=None if search is None else search.candidates[0],
            weights=weights,
            store_weights=store_weights,
            compile=compile,
            seed=seed,
        )
        num_statistics = self.base.statistics_layout.num_weights
        self.superfluous = superfluous
        self.transforms = make_transforms(superfluous)
        self.bank = MaskBank(self.layout.num_weights, num_statistics, with_standardisation=bool(self.transforms))
        self.combinations = Combinations(num_statistics)
        self.finished_masks = FinishedMasks(self.bank, self.combinations)
        self._mask_sizes = self.layout.sizes
        self.kept_scores: KeptScores | None = None
        self.combining = False  # the task in training is a combination, whose coefficients are trained
        self.start = StartingScores(mask.init, self.layout.num_weights)
        self.begins_like_another = mask.init == "nearest"
        if mask.init != "random":
            self.identity["init"] = mask.init
        if self.transforms:
            self.identity["superfluous"] = described(superfluous)
        self.search = search
        self.trials_per_task = 1 if search is None else search.num_trials
        if search is not None:
            self.identity["sparsity"] = f"auto {search.candidates} {search.tolerance}"
            # At once, so that what no candidate can meet is known before training.
            self.rules = {each: mask.make_rule(layout.shapes, sparsity=each) for each in search.candidates}

    # A task's life.

    def begin_task(self, *tasks: int) -> None:
        """Start from scores drawn from (seed, task), or from what the option ``init`` has in their place."""
        for task in tasks:
            self._check_unknown(task)
        if self.search is not None:
            self.rule = self.rules[self.search.begin(tasks[0])]
        scores = [self.start(self._drawn_scores(task)) for task in tasks]
        self._begin(*tasks, scores=scores, statistics=self.base.fresh_statistics())

    def finish_task(self, *tasks: int) -> None:
        """Commit the masks of the scores, and the running statistics, to the bank; see `commit_task`."""
        if self.search is not None:
            (task,) = tasks
            self._begin(task, scores=[self.search.scores], statistics=self.search.statistics)
            self.rule = self.rules[self.search.chosen(task)]
        self.commit_task(*tasks)
        for row in range(0 if self.combining else len(tasks)):
            self.start.remember(self.live.values[row])
        self.live.end()
        self.combining = False

    def commit_task(self, *tasks: int) -> None:
        """Store the tasks in training as they are now; their training may continue.

        Raises:
            ConfigurationError: training changed a buffer of the network that is no running statistic.
        """
        self._check_finished(tasks)
        if self.combining:
            coefficients = self.live.values[0, : len(self.bank)]
            self.combinations.set(self.live.task, coefficients, self.live.statistics[0], masks=self.bank.tasks)
            return
        masks = self.rule(self.live.values) > 0
        for row, task in enumerate(tasks):
            if task not in self.bank:
                self.bank.add(task, masks[row], self.live.statistics[row])
            elif not self.combinations.rests_on(task):
                self.bank.replace(task, masks[row], self.live.statistics[row])
            if self.kept_scores is not None:
                self.kept_scores.set(task, self.live.values[row])

    def _begin(self, *tasks: int, scores: list[Tensor], statistics: Tensor, combining: bool = False) -> None:
        self.live.begin(tasks, scores, statistics)
        self.combining = combining

    def _check_unknown(self, task: int) -> None:
        if task in self.finished_masks:
            raise ConfigurationError(
                f"Task {task} is finished and its mask is in the bank. To train anew, make a new method; to go on, "
                "resume from a checkpoint (ckpt_path); to train this task on, `reopen_task`; to train its mask again "
                "from the start, `bank.remove` it first."
            )

    # Tasks that depend on others: they start from them, or are trained several times.

    @property
    def one_after_another(self) -> str | None:
        """The option that makes tasks depend on where others end; None if several can be trained in the same step."""
        if self.search is not None:
            return "mask.sparsity=auto"
        return None if self.start.init == "random" else f"mask.init={self.start.init}"

    @property
    def depends_on_earlier(self) -> str | None:
        """The option that makes scores start from earlier tasks; None by default."""
        init = self.start.init
        return None if init == "random" else f"mask.init={init} starts scores from those of earlier tasks"

    def start_like(self, task: int) -> None:
        """Start the task in training from the mask of a finished one, with magnitudes of its own."""
        scores = self._scores_like(task, self._drawn_scores(self.live.task))
        self.live.begin(self.live.tasks, [scores])

    def finish_trial(self, task: int, *, accuracy: float) -> None:
        """End one of several trainings of a task, with its validation accuracy in [0, 1]."""
        assert self.search is not None
        self._check_finished((task,))
        self.search.judge(task, accuracy, *self.live.row(task))

    def _scores_like(self, task: int, drawn: Tensor) -> Tensor:
        """Scores with the mask of a finished task, out of freshly drawn ones."""
        mask = self.bank.get(task)
        return self.rule.scores_of(mask, drawn.to(mask.device))

    # Confidence of a task, compared with what it is on the task's own images.

    def standardise(self, task: int, mean: float, spread: float) -> None:
        """Keep the mean and the spread of a finished task's score on its own validation images."""
        self.bank.standardise(task, mean, spread)

    def standardisation(self, task: int) -> tuple[float, float]:
        """Mean and spread of the task's score; 0 and 1 before they were measured."""
        mean, spread = self.bank.read(task, "standardisation").tolist()
        return mean, spread

    # Streams that announce no task (scenario NNs).

    def keep_scores(self, place: str) -> None:
        """Keep the scores of finished tasks for `reopen_task`, in one of `KeptScores`' places."""
        if self.transforms:
            raise ConfigurationError(
                f"method.superfluous={described(self.superfluous)} measures each task's score when it ends, and "
                "scenario=nns does not tell when that is; use method.superfluous=idle."
            )
        if self.one_after_another is not None:
            raise ConfigurationError(
                f"{self.one_after_another} needs to be told where a task ends, and scenario=nns does not tell."
            )
        self.kept_scores = KeptScores(place)

    def reopen_task(self, task: int) -> None:
        """Train a finished task on, from its kept scores, or from scores made of its bits where none are kept.

        A mask that a combination rests on is trained without effect.
        """
        statistics = self.finished_masks.get_statistics(task)
        if task in self.combinations:
            coefficients = self.combinations.get(task, self.bank.tasks)
            self._begin(task, scores=[coefficients], statistics=statistics, combining=True)
            return
        scores = None if self.kept_scores is None else self.kept_scores.get(task)
        if scores is None:
            scores = self._scores_like(task, self._drawn_scores(task))
        self._begin(task, scores=[scores], statistics=statistics)

    def begin_combination(self, task: int) -> None:
        """Train no mask but coefficients of all masks there are, at first equal ones.

        From then on none of these masks can change: `reopen_task` keeps them as they are.
        """
        self._check_unknown(task)
        if not len(self.bank):
            raise ConfigurationError(f"Task {task} cannot be a combination: there is no mask yet.")
        # Coefficients take the first places of the scores, so that optimizers, checkpoints and DDP see one parameter
        # of one shape, whatever is trained.
        equal = self.frozen.new_full((len(self.bank),), 1 / len(self.bank))
        self._begin(task, scores=[equal], statistics=self.base.fresh_statistics(), combining=True)

    @contextmanager
    def with_random_masks(self, count: int) -> Iterator[None]:
        """Add masks of fresh scores, with negative numbers, for the length of a ``with`` block."""
        added = range(-count, 0)
        for task in added:
            fresh = self.rule(self._drawn_scores(task)) > 0
            self.bank.add(task, fresh, self.base.fresh_statistics())
        try:
            yield
        finally:
            for task in added:
                self.bank.remove(task)

    # Parameters.

    def effective(self, task: int) -> dict[str, Tensor]:
        """``W * M_task``: differentiable in the scores while the task is in training, from the bank afterwards.

        With the task's running statistics: those in training are updated in place, finished ones are copies. In
        evaluation mode, a task that is trained further counts as it was last committed.
        """
        # In training mode first: to look into the bank makes an accelerator wait.
        if task in self.live.tasks and not self.training and task in self.finished_masks:
            return self.finished_parameters(task)
        return super().effective(task)

    def live_parameters(self, values: Tensor) -> dict[str, Tensor]:
        """Parameters by name, ``(*tasks, *shape)``, differentiable in the scores or coefficients in training."""
        if self.combining:
            weights = self.bank.superpose(values[: len(self.bank)]) * self.frozen
        elif len(self.combinations) and self.combinations.rests_on(self.live.task):
            weights = self.bank.get(self.live.task) * self.frozen + 0 * values  # a gradient of 0, as DDP waits for one
        else:
            return super().live_parameters(values)
        return self.layout.split(weights)

    def finished_parameters(self, task: int) -> dict[str, Tensor]:
        """``W * M_task`` by name, and the task's running statistics. Raises `KeyError` if the task is not finished."""
        weights = self.finished_masks.select(task, self.frozen)
        statistics = self.finished_masks.get_statistics(task)
        return {**self.layout.split(weights), **self.base.statistics_layout.split(statistics)}

    def superposed(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """``W * sum_i a_i M_i`` by name, where a combination stands for a weighted mean of its masks."""
        return self.layout.split(self.finished_masks.superpose(coefficients) * self.frozen)

    def project(self, gradients: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """``dO/da_i = <dO/dW_a * W, M_i>``: one inner product per mask, ``(*batch, k)``; combinations combine them."""
        batch_dims = next(iter(gradients.values())).ndim - len(self.layout.shapes[0])
        vector = self.layout.flatten(gradients, batch_dims=batch_dims) * self.frozen
        return self.finished_masks.project(vector, rows)

    # What is kept.

    @property
    def tasks(self) -> Tensor:
        """The finished tasks, ``(k,)`` int64: masks, then combinations."""
        return self.finished_masks.tasks

    @property
    def num_masks(self) -> int:
        """Number of finished tasks that are no combination."""
        return len(self.bank)

    def sparsity(self) -> Tensor:
        """Measured share of weights that each mask, or combination, switches off, ``(k,)``."""
        return self.finished_masks.sparsity()

    def task_bytes(self) -> int:
        """Bytes per mask: one bit per weight, and the normalisation layers' statistics in float32."""
        return self.bank.num_bytes()

    def combination_bytes(self) -> int:
        """Bytes per combination: a float32 per mask, and the normalisation layers' statistics."""
        return 4 * (len(self.bank) + self.bank.statistics.shape[1])

    def bytes_of(self, task: int) -> int:
        """Bytes stored for this task."""
        return self.combination_bytes() if task in self.combinations else self.task_bytes()

    def parts(self) -> list[Part]:
        """Parameters and statistics in the network's order; the density is that of task 0's mask before training."""
        masks = self.layout.split(self.rule(self._drawn_scores(0)))
        statistics = self.base.statistics_layout.names
        parts = []
        for name, tensor in self.network.state_dict().items():
            kept, density, task_bytes = "frozen", None, 0.0
            if name in masks:
                kept, density, task_bytes = "mask", masks[name].mean().item(), tensor.numel() / 8
            elif name in statistics:
                kept, task_bytes = "statistics", 4.0 * tensor.numel()
            elif name in self.base.regrown:
                kept = "tied"
            parts.append(Part(name, tuple(tensor.shape), kept, density, task_bytes))
        if self.transforms:
            parts.append(Part("standardisation", (2,), "statistics", None, 8.0))
        return parts

    def details(self) -> dict[str, Any]:
        """Where scores started, what superfluous outputs learned, the search for the sparsity; none by default."""
        init = {"init": self.start.init} if self.start.init != "random" else {}
        superfluous = {"superfluous": described(self.superfluous)} if self.transforms else {}
        return {**init, **superfluous, **({} if self.search is None else {"sparsity_search": self.search.report()})}

    def layer_statistics(self) -> list[LayerStatistics]:
        """Density and overlap of the masks, one entry per masked parameter; combinations are left out."""
        return layer_statistics(self.bank, self.layout) if len(self.bank) else []

    def _learned(self) -> dict[str, Tensor]:
        return self.finished_masks.state()

    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        self.finished_masks.check_state(tensors)

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        if len(tensors["tasks"]) and len(self.start.remembered) and not self.start.num_tasks:
            logger.warning(
                "mask.init=%s: a file of masks holds no scores, so the next task starts at random; a checkpoint has "
                "them.",
                self.start.init,
            )
        self.finished_masks.load_state(tensors)

    def check_merge(self) -> None:
        """Do nothing: finished masks can be put together, whatever their scores started from."""

    def _merge_learned(self, tensors: dict[str, Tensor], source: str) -> None:
        self.finished_masks.merge(tensors, source)

    # Checkpoints.

    def get_extra_state(self) -> dict[str, Any]:
        """The identity, and whether a combination is in training; into `state_dict`."""
        return {**super().get_extra_state(), "combining": self.combining}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        self.combining = state.get("combining", False)

    def _follow_network(self) -> None:
        super()._follow_network()
        if self.search is not None and self.live.tasks:
            self.rule = self.rules[self.search.begin(self.live.task)]

    def _fill_in(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Parts of the state that older checkpoints do not have."""
        for name, value in self.start.state_dict().items():
            state_dict.setdefault(f"{prefix}start.{name}", value)
        for name, value in Combinations(self.bank.statistics.shape[1]).state_dict().items():
            state_dict.setdefault(f"{prefix}combinations.{name}", value)
        kept = f"{prefix}kept_scores._extra_state"
        if self.kept_scores is None:
            state_dict.pop(kept, None)  # needed only to train on
        else:
            state_dict.setdefault(kept, {"scores": {}})

    def _check_state(self, state: dict[str, Any], *, strict: bool) -> None:
        super()._check_state(state, strict=strict)
        check_combined(codec.under("bank.", state), codec.under("combinations.", state))
        kept = state.get("kept_scores._extra_state", {"scores": {}})["scores"]
        if any(scores.shape != (self.layout.num_weights,) for scores in kept.values()):
            raise DataError("What is stored of the scores of finished tasks is damaged.")
