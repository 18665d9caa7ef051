"""SupSup: a task is a binary mask over the frozen weights of one network (section 3 of the paper)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from supsup_lightning.bank import MaskBank, codec
from supsup_lightning.bank.combinations import Combinations
from supsup_lightning.bank.rows import check_names
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.layout import ByName, Layout, MaskRule
from supsup_lightning.masks import make_rule, masked_weights
from supsup_lightning.methods.frozen_network import FrozenNetworkMethod
from supsup_lightning.methods.kept_scores import KeptScores
from supsup_lightning.methods.method import Part
from supsup_lightning.methods.sparsity_search import CANDIDATES, SparsitySearch
from supsup_lightning.methods.starting_scores import StartingScores

logger = logging.getLogger(__name__)


class SupSup(FrozenNetworkMethod):
    """One frozen network, one mask a task; normalisation layers keep their running statistics for each task.

    A superposition belongs to no task, so it is normalised by the statistics of the batch at hand. A task may also be
    a linear combination of the masks of others (`begin_combination`).

    Args:
        network: any module. Its masked weights are overwritten with random ones (``weights``); none is trained.
        rule: ``threshold`` (on where the score is not negative) or ``topk`` (a fixed share of each layer is on).
        sparsity: with ``topk``, the share of weights switched off, in [0, 1); or ``auto``: each task gets the sparsest
            mask about as accurate as its densest (`SparsitySearch`), for several times the training.
        allocation: with ``topk``, how layers share it: ``uniform`` or ``erdos_renyi``.
        budget: in place of ``sparsity`` with ``erdos_renyi``: the paper's ``b``, more of it is denser.
        init: where the scores of a task start: ``random``, or from earlier tasks (`StartingScores`), on which its mask
            depends then.
        search_candidates: for ``sparsity="auto"``, sparsities to choose from; 2, 4, 8 or 16 of them.
        search_tolerance: for ``sparsity="auto"``, by how much validation accuracy may be below the densest mask's.
        weights: the base weights: ``signed_constant`` or ``kaiming_normal``, regrown from the seed; ``keep`` leaves the
            network's own (pretrained, say).
        is_masked: which parameters are masked: `ByName`, by default those of two or more dimensions, or any function
            of name and tensor.
        store_weights: put the masked weights into checkpoints and bank files, too. Otherwise these hold a checksum
            that refuses other weights. Parameters that are not masked (biases, say) are small and always stored.
        compile: training steps call the network through `torch.compile`; needs a C++ compiler (docs/speed.md).
        seed: of weights and scores.

    Attributes:
        scores: of the task in training, ``(weights,)``; or ``(tasks, weights)`` where several are trained at once.
        statistics: likewise ``(statistics,)`` or ``(tasks, statistics)``.
        together: the tasks that are trained at once now, in the order of the rows of `scores`.

    Raises:
        ConfigurationError: an option out of its range, or a network without a weight to mask.

    >>> method = SupSup(nn.Linear(4, 2, bias=False))
    >>> method.begin_task(0)
    >>> method(torch.ones(1, 4), 0).shape
    torch.Size([1, 2])
    >>> method.finish_task(0)
    >>> len(method.bank), method.task_bytes()
    (1, 1)
    """

    file_format = codec.MASK_BANK
    row_each = ("scores", "statistics")
    statistics: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        rule: str = "threshold",
        sparsity: float | str | None = None,
        allocation: str = "uniform",
        budget: float | None = None,
        init: str = "random",
        search_candidates: Sequence[float] = CANDIDATES,
        search_tolerance: float = 0.01,
        weights: str = "signed_constant",
        is_masked: MaskRule = ByName(),  # noqa: B008 (immutable)
        store_weights: bool = False,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        layout = Layout.of(network, is_masked)
        search = None
        if isinstance(sparsity, str):
            if sparsity != "auto" or rule != "topk":
                raise ConfigurationError(
                    f"mask.sparsity={sparsity} with mask.rule={rule}: give a share in [0, 1) or auto, and "
                    "mask.rule=topk."
                )
            search = SparsitySearch(
                search_candidates,
                tolerance=search_tolerance,
                num_weights=layout.num_weights,
                num_statistics=Layout.of_running_statistics(network).num_weights,
            )
            sparsity = search.candidates[0]
        # A combination's coefficients take the first places of the scores, so that optimizers, checkpoints and DDP see
        # one parameter of one shape, whatever is trained.
        super().__init__(
            network,
            layout=layout,
            base=layout,
            rule=rule,
            sparsity=sparsity,
            allocation=allocation,
            budget=budget,
            weights=weights,
            store_weights=store_weights,
            seed=seed,
        )
        self.bank = MaskBank(self.layout.num_weights, self.statistics_layout.num_weights)
        self.mask_sizes = self.layout.sizes
        self.combinations = Combinations(self.statistics_layout.num_weights)
        self.kept_scores: KeptScores | None = None
        self.register_buffer("statistics", self._fresh_statistics())  # of the task in training
        self.together: tuple[int, ...] = ()
        self.compile_network = compile
        self._compiled: dict[bool, Callable[[dict[str, Tensor], Tensor], Tensor]] = {}
        self.start = StartingScores(init, self.layout.num_weights)
        self.begins_like_another = init == "nearest"
        if init != "random":
            self.identity["init"] = init
        self.search = search
        if search is not None:
            self.trials_per_task = search.num_trials
            self.identity["sparsity"] = f"auto {search.candidates} {search.tolerance}"
            # At once, so that what no candidate can meet is known before training.
            self.rules = {
                candidate: make_rule(rule, layout.shapes, sparsity=candidate, allocation=allocation, budget=budget)
                for candidate in search.candidates
            }

    # A task's life.

    def begin_task(self, task: int) -> None:
        """Scores drawn from (seed, task), or what the option ``init`` has in their place."""
        self._check_unknown(task)
        if self.search is not None:
            self.rule = self.rules[self.search.begin(task)]
        self._begin(task, self.start(self._drawn_scores(task)), self._fresh_statistics())

    def start_like(self, task: int) -> None:
        """Start the task in training from the mask of a finished one, with magnitudes that are the task's own."""
        assert self.task_in_training is not None
        self._start(self.task_in_training, self._scores_like(task, self._drawn_scores(self.task_in_training)))

    def finish_trial(self, task: int, *, accuracy: float) -> None:
        """End one of several trainings of a task, with its validation accuracy."""
        assert self.search is not None
        self._check_training(task)
        self._average_statistics(self.statistics)
        self.search.judge(task, accuracy, self.scores, self.statistics)

    # Several tasks in the same step: a row of scores, and of statistics, each.

    @property
    def tasks_at_once(self) -> int:  # type: ignore[override]
        """For which there is room."""
        return 1 if self.scores.ndim == 1 else len(self.scores)

    @property
    def trains_together(self) -> bool:  # type: ignore[override]
        """Not where a task starts from earlier ones (``init``), or is trained several times (``sparsity="auto"``)."""
        return self._sequential_option is None

    @property
    def _sequential_option(self) -> str | None:
        """What makes tasks depend on where others end."""
        if self.search is not None:
            return "mask.sparsity=auto"
        return None if self.start.init == "random" else f"mask.init={self.start.init}"

    def train_at_once(self, count: int) -> None:
        """Make room for the scores of so many tasks. Raises `ConfigurationError` where it cannot be more than 1."""
        if count != 1 and not self.trains_together:
            raise ConfigurationError(
                f"{self._sequential_option} trains one task after another, not data.tasks_at_once={count}; leave out "
                "one of the two."
            )
        self._make_room(() if count == 1 else (count,))

    def _make_room(self, rows: tuple[int, ...]) -> None:
        if self.scores.shape[:-1] != rows:
            self.scores = nn.Parameter(self.scores.new_zeros(*rows, self.layout.num_weights))
            self.statistics = self.statistics.new_zeros(*rows, self.statistics_layout.num_weights)

    def begin_tasks(self, tasks: Sequence[int]) -> None:
        """Each as by `begin_task`."""
        if self.scores.ndim == 1:
            super().begin_tasks(tasks)
            return
        for task in tasks:
            self._check_unknown(task)
        with torch.no_grad():
            self.scores.zero_()
            for row, task in enumerate(tasks):
                self.scores[row] = self._drawn_scores(task)
            self.statistics[:] = self._fresh_statistics()
        self.scores.grad = None
        self.together = tuple(tasks)

    def finish_tasks(self, tasks: Sequence[int]) -> None:
        """Each as by `finish_task`."""
        if self.scores.ndim == 1:
            super().finish_tasks(tasks)
            return
        if tuple(tasks) != self.together:
            raise KeyError(f"Tasks {list(tasks)} are not in training ({list(self.together)} are).")
        self._check_buffers()
        self._average_statistics(self.statistics)
        for task, mask, statistics in zip(tasks, self.rule(self.scores) > 0, self.statistics, strict=False):
            self.bank.add(task, mask, statistics)
        self.together = ()

    def forward_together(self, images: Tensor) -> Tensor:
        """Logits ``(tasks, batch, output_size)`` of images ``(tasks, batch, *shape)`` of all tasks in training."""
        count = len(self.together)
        scores = self.scores if count == len(self.scores) else self.scores[:count]
        parameters = masked_weights(scores, self.frozen, self.rule, self.layout)
        # Under vmap, layers update statistics in place only where these are contiguous.
        parts = self._statistics_in_training(self.statistics[:count])
        statistics = {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
        logits = self._call_in_training({**parameters, **statistics}, images, together=True)
        for name, part in parts.items():
            part.copy_(statistics[name])
        return logits

    def _call(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return (self._call_in_training if self.training else self.call_network)(parameters, images)

    def check_training_step(self, images: Tensor) -> None:
        """Raise `ConfigurationError` where the network cannot be compiled, or not be trained on several tasks."""
        together = self.scores.ndim > 1
        if not together and not self.compile_network:
            return
        statistics = self.statistics_layout.split(self._fresh_statistics().expand_as(self.statistics))
        masked = masked_weights(self.scores, self.frozen, self.rule, self.layout)
        parameters = {**masked, **{name: part.clone() for name, part in statistics.items()}}
        try:
            with torch.random.fork_rng(devices=[]):
                images = images.expand(len(self.scores), *images.shape) if together else self.laid_out(images)
                logits = self._call_in_training(parameters, images, together=together)
                torch.autograd.grad(logits.sum(), self.scores)
        except RuntimeError as error:
            cause = " ".join(str(error).split("\n")[:2]).strip()
            name = type(self.network).__name__
            if self.compile_network:
                raise ConfigurationError(
                    f"{name} cannot be compiled here ({cause}); use method.compile=false."
                ) from error
            raise ConfigurationError(
                f"{name} cannot be trained on {len(self.scores)} tasks in the same step ({cause}). Layers that draw "
                "at random (dropout) or look at values cannot be, nor can activation checkpointing; use "
                "data.tasks_at_once=1."
            ) from error

    def _parameters_in_training(self, scores: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        """``(*tasks, *shape)`` each."""
        masked = masked_weights(scores, self.frozen, self.rule, self.layout)
        return {**masked, **self._statistics_in_training(statistics)}

    def _call_in_training(self, parameters: dict[str, Tensor], images: Tensor, *, together: bool = False) -> Tensor:
        """`call_network`, compiled if it is to be; with one more dimension, of tasks, in front of everything."""
        if not self.compile_network:
            return (vmap(self.call_network) if together else self.call_network)(parameters, images)
        if together not in self._compiled:
            self._compiled[together] = torch.compile(vmap(self.call_network) if together else self.call_network)
        return self._compiled[together](parameters, images)

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled functions, which are this very object's."""
        return {**self.__dict__, "_compiled": {}}

    def begin_combination(self, task: int) -> None:
        """Train no mask but coefficients of all masks there are, equal ones at first.

        From then on none of these masks can change: `reopen_task` keeps them as they are.
        """
        self._check_unknown(task)
        if not len(self.bank):
            raise ConfigurationError(f"Task {task} cannot be a combination: there is no mask yet.")
        equal = self.scores.new_full((len(self.bank),), 1 / len(self.bank))
        self._begin(task, equal, self._fresh_statistics(), combining=True)

    def keep_scores(self, place: str) -> None:
        """Keep the scores of finished tasks for `reopen_task`, in one of `KeptScores`' places."""
        if self._sequential_option is not None:
            raise ConfigurationError(
                f"{self._sequential_option} needs to be told where a task ends, and scenario=nns does not tell."
            )
        self.kept_scores = KeptScores(place)

    @contextmanager
    def with_random_masks(self, count: int) -> Iterator[None]:
        """Masks of fresh scores for the length of a ``with`` block."""
        added = range(-count, 0)
        for task in added:
            fresh = self.rule(self._drawn_scores(task)) > 0
            self.bank.add(task, fresh, self._fresh_statistics())
        try:
            yield
        finally:
            for task in added:
                self.bank.remove(task)

    def reopen_task(self, task: int) -> None:
        """Train a finished task on, from its kept scores, or from scores made of its bits where none are kept.

        A mask that a combination rests on is trained without effect.
        """
        if task in self.combinations:
            coefficients = self.combinations.get(task, self.bank.tasks)
            self._begin(task, coefficients, self.combinations.get_statistics(task), combining=True)
            return
        scores = None if self.kept_scores is None else self.kept_scores.get(task)
        if scores is None:
            scores = self._scores_like(task, self._drawn_scores(task))
        self._begin(task, scores, self.bank.get_statistics(task))

    def _scores_like(self, task: int, drawn: Tensor) -> Tensor:
        """Scores with the mask of a finished task, out of freshly drawn ones."""
        mask = self.bank.get(task)
        return self.rule.scores_of(mask, drawn.to(mask.device))

    def commit_task(self, task: int) -> None:
        """Put the task in training into what is kept, as it is now; its training may go on.

        Raises:
            ConfigurationError: training changed a buffer of the network that is no running statistic.
        """
        self._check_training(task)
        self._average_statistics(self.statistics)
        if self.combining:
            self.combinations.set(task, self._coefficients(), self.statistics, masks=self.bank.tasks)
            return
        mask = self.rule(self.scores) > 0
        if task not in self.bank:
            self.bank.add(task, mask, self.statistics)
        elif not self.combinations.rests_on(task):
            self.bank.replace(task, mask, self.statistics)
        if self.kept_scores is not None:
            self.kept_scores.set(task, self.scores)

    def finish_task(self, task: int) -> None:
        """Commit the mask of the scores, and the running statistics, to the bank; see `commit_task`."""
        if self.search is not None:
            self._begin(task, self.search.scores, self.search.statistics)
            self.rule = self.rules[self.search.chosen(task)]
        self.commit_task(task)
        if not self.combining:
            self.start.remember(self.scores)
        self.task_in_training, self.combining = None, False

    def _begin(self, task: int, values: Tensor, statistics: Tensor, *, combining: bool = False) -> None:
        self._start(task, values)
        self.statistics.copy_(statistics)
        self.combining = combining

    def _check_unknown(self, task: int) -> None:
        if task in self.bank or task in self.combinations:
            raise ConfigurationError(
                f"Task {task} is finished and its mask is in the bank. To train anew, make a new method; to go on, "
                "resume from a checkpoint (ckpt_path); to train this task on, `reopen_task`; to train its mask again "
                "from the start, `bank.remove` it first."
            )

    def _coefficients(self) -> Tensor:
        """Of the combination in training, over the bank's masks, ``(masks,)``."""
        return self.scores[: len(self.bank)]

    def effective(self, task: int) -> dict[str, Tensor]:
        """``W * M_task``: differentiable in the scores while the task is in training, from the bank afterwards.

        With the task's running statistics: those in training are updated in place, finished ones are copies. In
        evaluation mode, a task that is trained on counts as it was last committed.
        """
        # In training first: to look into the bank makes an accelerator wait.
        if task == self.task_in_training and (
            self.training or (task not in self.bank and task not in self.combinations)
        ):
            return self._in_training(task)
        if task in self.together:
            row = self.together.index(task)
            return self._parameters_in_training(self.scores[row], self.statistics[row])
        if task in self.combinations:
            weights = self.bank.superpose(self.combinations.get(task, self.bank.tasks)) * self.frozen
            kept = self.combinations.get_statistics(task)
        else:
            weights = self.bank.select(task, self.frozen)
            kept = self.bank.get_statistics(task)
        return {**self.layout.split(weights), **self.statistics_layout.split(kept)}

    def _in_training(self, task: int) -> dict[str, Tensor]:
        """Parameters by name, differentiable in the scores."""
        if self.combining:
            weights = self.bank.superpose(self._coefficients()) * self.frozen
        elif len(self.combinations) and self.combinations.rests_on(task):
            weights = self.bank.get(task) * self.frozen + 0 * self.scores  # a gradient of 0, as DDP waits for one
        else:
            return self._parameters_in_training(self.scores, self.statistics)
        return {**self.layout.split(weights), **self._statistics_in_training(self.statistics)}

    # Superposition.

    @property
    def tasks(self) -> Tensor:
        """The finished tasks, ``(k,)`` int64: masks, then combinations."""
        return torch.cat([self.bank.tasks, self.combinations.tasks])

    @property
    def num_masks(self) -> int:
        """Finished tasks that are no combination."""
        return len(self.bank)

    def superposed(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """``W * sum_i a_i M_i``, where a combination stands for a weighted mean of its masks."""
        if len(self.combinations):
            masks, k = len(self.bank), len(self.tasks)
            if coefficients is None:
                coefficients = self.frozen.new_full((k,), 1 / k)
            own, combined = coefficients[:masks], coefficients[masks:]
            coefficients = own + combined @ self._shares()
        return self.layout.split(self.bank.superpose(coefficients) * self.frozen)

    def project(self, gradients: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """``dO/da_i = <dO/dW_a * W, M_i>``: one inner product a mask, ``(*batch, k)``; combinations combine them."""
        batch_dims = next(iter(gradients.values())).ndim - len(self.layout.shapes[0])
        vector = self.layout.flatten(gradients, batch_dims=batch_dims) * self.frozen
        if not len(self.combinations):
            return self.bank.project(vector, rows)
        masks = self.bank.project(vector)
        products = torch.cat([masks, masks @ self._shares().T], dim=-1)
        return products if rows is None else products[..., rows]

    def _shares(self) -> Tensor:
        """Coefficients of the combinations, of magnitude 1 in all: else the larger sum would win every gradient."""
        matrix = self.combinations.matrix(self.bank.tasks)
        return matrix / matrix.abs().sum(1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)

    # What is kept.

    def sparsity(self) -> Tensor:
        """Measured share of weights that each mask, or combination, switches off, ``(k,)``."""
        combined = [self.bank.superpose(row) for row in self.combinations.matrix(self.bank.tasks)]
        return torch.cat([self.bank.sparsity(), *((weights == 0).float().mean().view(1) for weights in combined)])

    def task_bytes(self) -> int:
        """One bit a weight, and the normalisation layers' statistics in float32."""
        return self.bank.packed.shape[1] + self.bank.statistics.shape[1] * self.bank.statistics.itemsize

    def combination_bytes(self) -> int:
        """Bytes that a combination adds: a float32 a mask, and the normalisation layers' statistics."""
        return 4 * (len(self.bank) + self.statistics_layout.num_weights)

    def bytes_of(self, task: int) -> int:
        """Of a mask, or of a combination."""
        return self.combination_bytes() if task in self.combinations else self.task_bytes()

    def parts(self) -> list[Part]:
        """Parameters and statistics in the network's order; the density is that of task 0's mask before training."""
        masks = self.layout.split(self.rule(self._drawn_scores(0)))
        parts = []
        for name, tensor in self.network.state_dict().items():
            kept, density, task_bytes = "frozen", None, 0.0
            if name not in masks and name in self._regrown and name not in self.statistics_layout.names:
                kept = "tied"
            elif name in masks:
                kept, density, task_bytes = "mask", masks[name].mean().item(), tensor.numel() / 8
            elif name in self.statistics_layout.names:
                kept, task_bytes = "statistics", float(tensor.numel() * self.statistics.itemsize)
            parts.append(Part(name, tuple(tensor.shape), kept, density, task_bytes))
        return parts

    def details(self) -> dict[str, Any]:
        """Where scores started, if not at random, and the search for each task's sparsity, if there was one."""
        init = {"init": self.start.init} if self.start.init != "random" else {}
        return {**init, **({} if self.search is None else {"sparsity_search": self.search.report()})}

    def _learned(self) -> dict[str, Tensor]:
        """The bank, and the combinations where there are any."""
        bank = {name: value for name, value in self.bank.state_dict().items() if name != "statistics" or value.shape[1]}
        combined = self.combinations.state_dict() if len(self.combinations) else {}
        return {**bank, **codec.prefixed("combinations.", combined)}

    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        check_names(tensors, {"packed", "tasks"}, optional=self._optional(tensors))
        bank, combined = self._parts_of(tensors)
        self.bank.check_state(bank)
        self.combinations.check_state(combined)
        _check_combined(bank, combined)

    def _optional(self, tensors: dict[str, Tensor]) -> set[str]:
        """Statistics where the network has any, and combinations as a whole."""
        combined = {f"combinations.{name}" for name in self.combinations.state_dict()}
        statistics = {"statistics"} if self.statistics_layout.names else set()
        return statistics | (combined if combined <= tensors.keys() else set())

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        """Both from a file."""
        bank, combined = self._parts_of(tensors)
        if len(bank["tasks"]) and len(self.start.remembered) and not self.start.num_tasks:
            logger.warning(
                "mask.init=%s: a file of masks holds no scores, so the next task starts at random; a checkpoint has "
                "them.",
                self.start.init,
            )
        self.bank.load_state_dict(bank)
        self.combinations.load_state_dict(combined)

    def _parts_of(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """States of bank and combinations out of a file's tensors."""
        bank = {name: tensors[name] for name in ("packed", "tasks")}
        bank["statistics"] = tensors.get("statistics", torch.empty(bank["tasks"].numel(), 0))
        combined = codec.under("combinations.", tensors)
        return bank, combined or Combinations(self.statistics_layout.num_weights).state_dict()

    def merge(self, path: str | Path) -> None:
        """Add the tasks of a bank file, trained elsewhere on the same network.

        Raises:
            MismatchError: it was made with another network, seed or rule, or other parameters that are not masked.
            KeyError: a task is in both and differs. Nothing is merged then.
        """
        learned, parameters = self._read(path)
        bank, combined = self._parts_of(learned)
        own = self.network.state_dict()
        different = [name for name, value in parameters.items() if not torch.equal(own[name].cpu(), value)]
        if different:
            raise MismatchError(
                f"The mask bank {path} was trained with other values of {', '.join(different)}, which are not masked. "
                "Make the network from the same seed (lightning.seed_everything) wherever it is trained."
            )
        if len(combined["tasks"]):
            raise MismatchError(
                f"The mask bank {path} holds combinations of its masks, which cannot be merged; load it by itself."
            )
        other = MaskBank(self.layout.num_weights, self.statistics_layout.num_weights)
        other.load_state_dict(bank)
        clashes = sorted({*other.tasks.tolist()} & {*self.combinations.tasks.tolist()})
        if clashes:
            raise KeyError(f"Tasks {clashes} are combinations here and masks in {path}; nothing is merged.")
        self.bank.merge(other)

    def get_extra_state(self) -> dict[str, Any]:
        """With what is in training: a mask, several of them, or coefficients."""
        return {**super().get_extra_state(), "combining": self.combining, "together": self.together}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`."""
        super().set_extra_state(state)
        self.combining = state.get("combining", False)
        self.together = tuple(state.get("together", ()))

    def _follow_network(self) -> None:
        super()._follow_network()
        if self.search is not None and self.task_in_training is not None:
            self.rule = self.rules[self.search.begin(self.task_in_training)]

    def _fill_in(self, state_dict: dict[str, Any], prefix: str) -> None:
        """What checkpoints did not have before there was any of it."""
        for name, value in self.start.state_dict().items():
            state_dict.setdefault(f"{prefix}start.{name}", value)
        for name, value in Combinations(self.statistics_layout.num_weights).state_dict().items():
            state_dict.setdefault(f"{prefix}combinations.{name}", value)
        kept = f"{prefix}kept_scores._extra_state"
        if self.kept_scores is None:
            state_dict.pop(kept, None)  # needed only to train on
        else:
            state_dict.setdefault(kept, {"scores": {}})

    def _check_state(self, state: dict[str, Any], *, strict: bool) -> None:
        super()._check_state(state, strict=strict)
        _check_combined(codec.under("bank.", state), codec.under("combinations.", state))
        rows = [tuple(state[name].shape[:-1]) for name in self.row_each if name in state]
        if len(set(rows)) > 1 or any(len(shape) > 1 for shape in rows):
            raise DataError(f"What is stored in training is damaged: it is of {' and '.join(map(str, rows))} tasks.")
        kept = state.get("kept_scores._extra_state", {"scores": {}})["scores"]
        if any(scores.shape != (self.layout.num_weights,) for scores in kept.values()):
            raise DataError("What is stored of the scores of finished tasks is damaged.")

    def _make_room_for(self, state: dict[str, Any]) -> None:
        if "scores" in state:
            self._make_room(tuple(state["scores"].shape[:-1]))


def _check_combined(bank: dict[str, Tensor], combined: dict[str, Tensor]) -> None:
    """Raise `DataError` where combinations rest on no masks or on absent ones, or have a mask of their own."""
    if not combined or not bank:
        return
    own = {*bank["tasks"].tolist()}
    used = combined["masks"][combined["coefficients"].any(0)]
    without_masks = ~combined["coefficients"].any(1)
    if own & {*combined["tasks"].tolist()} or not {*used.tolist()} <= own or without_masks.any():
        raise DataError("What is stored of each combination is damaged: it does not fit the masks.")
