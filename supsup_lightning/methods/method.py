"""The base class of all methods: what the module, the callbacks and the inference ask of any of them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from supsup_lightning.bank import codec
from supsup_lightning.bank.rows import TaskRows, check_names, check_tensor, same_kind
from supsup_lightning.checks.meaning import meaning
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.layout import Layout
from supsup_lightning.methods.base_network import BaseNetwork
from supsup_lightning.methods.live import LiveTasks
from supsup_lightning.methods.protocols import ByNumber
from supsup_lightning.methods.recompute import keep_for_backward, take_out
from supsup_lightning.methods.transforms import Transform

if TYPE_CHECKING:
    from supsup_lightning.gate import Gate

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """What a task keeps of one parameter or buffer of the network.

    Attributes:
        name: as in the network.
        shape: its shape.
        kept: ``mask``, ``implicit`` (a mask in a memory that all tasks share), ``statistics`` (its own values),
            ``own`` (its own values), ``factors`` (two vectors that scale it), ``tied`` (to a masked parameter of
            another name); or nothing, because it is ``frozen``, ``shared`` (trained by the first task),
            ``overwritten`` by each task, or that and ``rotated`` for each.
        density: share of a mask's weights that are on.
        task_bytes: bytes that one more task adds.
    """

    name: str
    shape: tuple[int, ...]
    kept: str
    density: float | None
    task_bytes: float


class Method(nn.Module, ABC):
    """A map from a task to effective parameters of one network, which stays as it is.

    A task's life: ``begin_task(t)``, training of ``trainable()`` through ``forward_live(images)``, ``finish_task(t)``.
    From then on the effective parameters of ``t`` never change. What only some methods offer is in `protocols`.

    Base weights regrow from their seed, or come with the network. A checksum stands for them in checkpoints and files,
    and refuses any others; what does not regrow (biases, constant buffers) is small and stored.

    Args:
        network: any module; its parameters are only ever replaced for the length of one call.
        layout: parameters that a task has its own values of; by default all.
        drawn: weights that are drawn from the seed, unless ``weights`` is ``keep``; by default those of two or more
            dimensions.
        identified: names of the parameters whose values have to agree, as they are not stored and finished tasks need
            them.
        num_values: trained values per task; by default one per weight of ``layout``.
        weights: one of `WEIGHT_INITIALISERS`; ``keep`` leaves the network's own.
        store_weights: put the identified parameters into checkpoints and files, too.
        compile: training steps call the network through `torch.compile`.
        seed: of everything random.

    Attributes:
        live: the tasks in training.
        finished: what is kept of finished tasks, one row per task; set by a subclass.
        identity: options and checksum that a checkpoint or file has to share.
        gate: sums over features of the finished tasks' images, by which inference=discriminant finds tasks; set by
            `ContinualModule`. None for any other inference.
        transforms: of the copies of images that superfluous outputs learn, the identity first; empty if they learn
            nothing.
        begins_anew: `begin_task` does not depend on what earlier tasks, or an earlier attempt at the task, have left.
    """

    finished: TaskRows
    file_format: str = codec.TRAINED_NETWORK
    begins_anew = True
    transforms: tuple[Transform, ...] = ()
    _mask_sizes: tuple[int, ...] = ()  # of layers, where what is kept is masks
    _needs_base = True  # finished tasks compute with the network's own weights
    _keeps_statistics = True  # each task has running statistics of its own

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout | None = None,
        drawn: Layout | None = None,
        identified: tuple[str, ...] = (),
        num_values: int | None = None,
        weights: str = "keep",
        store_weights: bool = False,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if drawn is None:
            drawn = Layout.choosing(network, lambda name, parameter: parameter.ndim >= 2)
        self.layout = Layout.choosing(network, lambda name, parameter: True) if layout is None else layout
        self.base = BaseNetwork(network, drawn=drawn, identified=identified, weights=weights, seed=seed)
        self.network = network
        self.gate: Gate | None = None
        num_values = self.layout.num_weights if num_values is None else num_values
        statistics = self.base.fresh_statistics()
        self.live = LiveTasks(num_values, statistics if self._keeps_statistics else statistics[:0], compile=compile)
        self.weights = weights
        self.store_weights = store_weights
        self.seed = seed
        self.identity = {"seed": str(seed), "weights": weights, "network": self.base.checksum(self.layout.names)}
        self._register_state_dict_hook(_leave_out_base_weights)
        self.register_load_state_dict_pre_hook(_check_and_fill_in)
        self.register_load_state_dict_post_hook(_follow)

    # A task's life.

    @abstractmethod
    def begin_task(self, *tasks: int) -> None:
        """Start training one task, or several in the same step: ``live.begin``, from values that depend on nothing but
        the seed and the task.
        """

    @abstractmethod
    def finish_task(self, *tasks: int) -> None:
        """Store what was trained, then ``live.end``."""

    @abstractmethod
    def live_parameters(self, values: Tensor) -> dict[str, Tensor]:
        """Parameters by name, ``(*tasks, *shape)``, out of values in training ``(*tasks, num_values)``; differentiable.

        Running statistics are added by the caller.
        """

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that an optimizer changes: ``live.values``, the same object for every task."""
        return [self.live.values]

    def effective(self, task: int) -> dict[str, Tensor]:
        """Parameters by name for ``task``, in training or finished, and the buffers that are the task's own.

        Differentiable in ``live.values`` while the task is in training. Its running statistics are updated in place
        then; those of finished tasks are copies.

        Raises:
            KeyError: any other task: the normalisation of another task would be a guess.
        """
        if task in self.live.tasks:
            return self._in_training(*(self.live.current() if self.live.rows == 1 else self.live.row(task)))
        if not isinstance(self, ByNumber):
            name = type(self).__name__
            raise KeyError(f"Task {task} is not in training, and {name} has no parameters of finished tasks by number.")
        return self.finished_parameters(task)

    def _in_training(self, values: Tensor, statistics: Tensor) -> dict[str, Tensor]:
        """Parameters by name, and running statistics for layers to update in place."""
        return {**self.live_parameters(values), **self.base.statistics_by_name(statistics)}

    def _check_finished(self, tasks: tuple[int, ...]) -> None:
        """Check that these tasks are in training and the network is unchanged; average the statistics."""
        self.live.check(tasks)
        self.base.check_constants()
        self.live.average_statistics()

    @property
    def depends_on_earlier(self) -> str | None:
        """Why a task, or what is kept of it, depends on earlier tasks, so that tasks cannot be trained apart.

        None if a task depends on the seed, its number and its data alone; a method says so itself.
        """
        return f"{type(self).__name__} does not say that its tasks are independent of earlier ones"

    # Calls of the network.

    def forward(self, images: Tensor, task: int) -> Tensor:
        """Logits ``(batch, output_size)`` under the effective parameters of ``task``."""
        take_out(self.network)
        parameters = self.effective(task)
        logits = self.call_network(parameters, self.base.laid_out(images))
        return keep_for_backward(logits, self.network, lambda: self.base.given(parameters))

    def forward_live(self, images: Tensor) -> Tensor:
        """Logits ``(tasks, batch, output_size)`` of images ``(tasks, batch, *shape)`` of all tasks in training."""
        take_out(self.network)
        parameters = self._in_training(*self.live.current())
        if self.live.rows == 1:
            images = self.base.laid_out(images.squeeze(0)).unsqueeze(0)
        updated = self.base.statistics_layout.names
        logits = self.live.run(self.call_network, parameters, images, updated=updated)
        if self.live.rows > 1:
            return logits
        return keep_for_backward(logits, self.network, lambda: self.base.given(parameters))

    def call_network(self, parameters: dict[str, Any], images: Tensor) -> Tensor:
        """Logits ``(batch, output_size)`` of the network with these parameters in place of its own."""
        return self.base.call(parameters, images)

    # What is kept.

    @property
    def tasks(self) -> Tensor:
        """The finished tasks, ``(k,)`` int64; where a method superposes, in the order of the coefficients."""
        return self.finished.tasks

    def sparsity(self) -> Tensor:
        """Measured share of weights that each finished task switches off, ``(k,)``."""
        return torch.zeros(len(self.tasks), device=self.live.values.device)

    def task_bytes(self) -> int:
        """Bytes that one more task adds to what is kept."""
        return self.finished.num_bytes()

    @abstractmethod
    def parts(self) -> list[Part]:
        """What a task keeps, per parameter and buffer; the bytes add up to `task_bytes` (rounded up)."""

    def details(self) -> dict[str, Any]:
        """Further entries of results.json."""
        return {}

    def dense_bytes(self) -> int:
        """Bytes of one whole network whose parameters are all kept in float32: the unit of ``cap`` in results.json.

        ``cap`` is the CAP of Kang et al. 2022 ("Winning subnetworks"), ``(1 - S) + (1 - alpha) T / 32``, in which
        the bytes of the file take the place of an assumed compression rate ``alpha``.
        """
        return 4 * sum(parameter.numel() for parameter in self.network.parameters())

    def kept(self) -> dict[str, Tensor]:
        """Tensors by name that `save` writes: all that finished tasks need beside code and configuration."""
        state = self.network.state_dict()
        parameters = {name: p for name, p in state.items() if self._is_stored(name) and self._is_needed(name)}
        seed = {"seed": torch.tensor(self.seed)} if self._needs_seed else {}
        gate = {} if self.gate is None else codec.prefixed("gate.", self.gate.kept())
        return {**self._learned(), **codec.prefixed("parameters.", parameters), **seed, **gate}

    def kept_bytes(self) -> dict[str, int]:
        """Bytes of what is kept, by the first part of its names; all methods are compared by this rule.

        ``network`` is for weights that prediction needs and that no file of this package has: a pretrained network's.
        """
        bytes_by_part: dict[str, int] = {}
        for name, tensor in self.kept().items():
            part = name.partition(".")[0]
            bytes_by_part[part] = bytes_by_part.get(part, 0) + tensor.nbytes
        if self.weights == "keep" and not self.store_weights and self._needs_base:
            parameters = dict(self.network.named_parameters())
            elsewhere = sum(parameters[name].nbytes for name in self.base.identified if self._is_needed(name))
            bytes_by_part |= {"network": elsewhere} if elsewhere else {}
        return bytes_by_part

    def save(self, path: str | Path, *, recipe: Mapping[str, Any] | None = None) -> None:
        """Write what is kept, and what identifies network, seed and options.

        Args:
            path: path of the file.
            recipe: what it takes to predict without this object; `ContinualModule.save` gives it.
        """
        codec.write(
            path,
            self.kept(),
            file_format=self.file_format,
            identity=self.identity | ({} if self.gate is None else self.gate.identity()),
            mask_sizes=self._mask_sizes,
            recipe=recipe,
        )

    def load(self, path: str | Path) -> None:
        """Replace what was learned by the contents of a file.

        Raises:
            MismatchError: another network or options made it. Nothing is replaced then.
            DataError: it is damaged. Nothing is replaced then.
        """
        learned, parameters, gate = self._read(path)
        self.base.set_parameters(parameters)
        self._set_learned(learned)
        if self.gate is not None and gate is not None:
            self.gate.take(gate)
        self._follow_network()

    def merge(self, path: str | Path) -> None:
        """Add the tasks of a file, trained elsewhere on the same network.

        Raises:
            ConfigurationError: the method's tasks depend on one another.
            MismatchError: it was made with another network, seed or options, or other parameters that are not masked.
            KeyError: a task is in both and differs. Nothing is merged then.
        """
        self.check_merge()
        learned, parameters, gate = self._read(path)
        own = self.network.state_dict()
        different = [name for name, value in parameters.items() if not torch.equal(own[name].cpu(), value)]
        if different:
            raise MismatchError(
                f"The mask bank {path} was trained with other values of {', '.join(different)}, which are not masked. "
                "Make the network from the same seed (lightning.seed_everything) wherever it is trained."
            )
        new = {*learned["tasks"].tolist()} - {*self.tasks.tolist()}
        if self.gate is not None and gate is not None:
            self.gate.check_merge(gate, tasks=new)
        self._merge_learned(learned, str(path))
        if self.gate is not None and gate is not None:
            self.gate.merge(gate, tasks=new)

    def check_merge(self) -> None:
        """Raise `ConfigurationError` if tasks that were trained apart cannot be put together."""
        if self.depends_on_earlier is not None:
            raise ConfigurationError(f"Files cannot be merged: {self.depends_on_earlier}. Load one of them by itself.")

    def _merge_learned(self, tensors: dict[str, Tensor], source: str) -> None:
        """Add the rows of other tasks. Raises `KeyError` if a task is in both and differs."""
        rows = self._rows(tensors)
        places = {task: place for place, task in enumerate(rows["tasks"].tolist())}
        for task in places.keys() & {*self.finished.tasks.tolist()}:
            for name in self.finished.columns:
                if not torch.equal(self.finished.read(task, name).cpu(), rows[name][places[task]].cpu()):
                    raise KeyError(f"Task {task} is in both and has other {name} in {source}; nothing is merged.")
        for task, place in places.items():
            if task not in self.finished:
                self.finished.append(task, **{name: rows[name][place] for name in self.finished.columns})

    # What a file holds of the finished tasks: by default the rows of `finished`; tables of no columns are left out.

    def _learned(self) -> dict[str, Tensor]:
        """Tensors of the finished tasks, for a file."""
        return {name: value for name, value in self.finished.state_dict().items() if value.ndim == 1 or value.shape[1]}

    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        """Raise `DataError` or `MismatchError` unless these are what `_learned` gives for some number of tasks."""
        check_names(tensors, {*self._learned()})
        self.finished.check_state(self._rows(tensors))

    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        """Load what `_learned` returned."""
        self.finished.load_state_dict(self._rows(tensors))

    def _rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        none = torch.empty(tensors["tasks"].numel(), 0)
        return {name: tensors.get(name, none) for name in self.finished.state_dict()}

    @property
    def _needs_seed(self) -> bool:
        """Whether finished tasks need values that are drawn from the seed."""
        return self._needs_base and self.weights != "keep" and not self.store_weights

    def _is_stored(self, name: str) -> bool:
        return self.store_weights or name not in self.base.regrown

    def _is_needed(self, name: str) -> bool:
        """Whether finished tasks compute with this parameter or buffer of the network's own."""
        return name not in self.base.statistics_layout.names

    def _read(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], "Gate | None"]:
        """Read a file: what was learned, the network's parameters, and the gate."""
        tensors, identity = codec.read(path, file_format=self.file_format, mask_sizes=self._mask_sizes)
        parameters = codec.under("parameters.", tensors)
        self._check_identity(identity, f"The file {path}", parameters)
        own = self.network.state_dict()
        needed = {name for name in own if name not in self.base.regrown and self._is_needed(name)}
        learned = {name: value for name, value in tensors.items() if not name.startswith(("parameters.", "gate."))}
        seed = learned.pop("seed", None)
        try:
            if missing := needed - parameters.keys():
                raise DataError(f"it lacks the network's {', '.join(sorted(missing))}")
            for name, value in parameters.items():
                check_tensor(parameters, name, own[name], "parameter")
                if value.dtype != own[name].dtype and not value.is_floating_point():
                    raise DataError(f"{name} is {value.dtype}")
            if seed is None and self._needs_seed and not {*self.base.identified} <= parameters.keys():
                raise DataError("it lacks the seed")
            if seed is not None and (seed.dtype != torch.int64 or not torch.equal(seed, torch.tensor(self.seed))):
                raise DataError(f"its seed is not {self.seed}")
            self._check_learned(learned)
            gate = self._read_gate(codec.under("gate.", tensors), identity.get("gate"), f"The file {path}")
        except DataError as error:
            raise DataError(f"The file {path} is refused: {error}") from error
        return learned, parameters, gate

    def _read_gate(self, tensors: dict[str, Tensor], description: str | None, source: str) -> "Gate | None":
        if self.gate is not None:
            return self.gate.read(tensors, description, source)
        if tensors:
            logger.warning("%s also has sums for inference=discriminant, which are left out here.", source)
        return None

    def _check_identity(self, stored: Mapping[str, str], source: str, parameters: Mapping[str, Tensor]) -> None:
        """Raise `MismatchError` unless ``stored`` is this configuration; with weights of its own, they may differ."""
        shapes = {name: p.shape for name, p in self.network.state_dict().items()}
        fits = all(name in shapes and shapes[name] == value.shape for name, value in parameters.items())
        own_weights = fits and all(name in parameters for name in self.base.identified)
        checksum = self.base.checksum(self.layout.names, parameters) if own_weights else self.identity["network"]
        expected = {**self.identity, "network": checksum}
        differences = [
            f"{key} {stored.get(key)!r} there, {value!r} here"
            if key != "network"
            else "another network or other weights"
            for key, value in expected.items()
            if meaning(stored.get(key)) != meaning(value)
        ]
        if differences or not fits:
            raise MismatchError(
                f"{source} does not belong to this configuration: {'; '.join(differences) or 'another network'}. "
                "Use the network, seed, method and mask options that it was made with, or start afresh without it."
            )

    # Checkpoints.

    def get_extra_state(self) -> dict[str, Any]:
        """The identity, into `state_dict`."""
        return {"identity": self.identity}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Do nothing: the identity was checked before loading."""

    def _fill_in(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Fill in what older checkpoints lack."""

    def _check_state(self, state: dict[str, Any], *, strict: bool) -> None:
        """Raise `DataError` or `MismatchError` if a state is not this method's, before any of it is loaded.

        Args:
            state: with what was left out, by names within the method.
            strict: nothing may be missing or in excess.
        """
        own = self.state_dict()
        names = {*own, *(f"network.{name}" for name in self.network.state_dict())}
        if strict and state.keys() != names:
            missing, extra = sorted(names - state.keys()), sorted(state.keys() - names)
            if missing and not extra and all(name.startswith("gate.") for name in missing):
                raise MismatchError(
                    "What is stored has no sums for inference=discriminant, which this model has: it was trained with "
                    "another inference. Make the model with that one, ContinualModule(method, inference=OneShot()) for "
                    "example."
                )
            raise MismatchError(
                f"What is stored is not of this method: {', '.join(missing) or 'nothing'} missing, "
                f"{', '.join(extra) or 'nothing'} in excess."
            )
        growing = [f"{name}." for name, part in self.named_modules() if hasattr(part, "check_state")]
        for prefix in growing:
            self.get_submodule(prefix[:-1]).check_state(codec.under(prefix, state))  # type: ignore[operator]
        for name, value in {**own, **codec.prefixed("network.", self.network.state_dict())}.items():
            stored = state.get(name)
            if stored is None or not isinstance(value, Tensor) or name.startswith(tuple(growing)):
                continue
            if not isinstance(stored, Tensor) or not same_kind(stored, value):
                raise DataError(f"What is stored is damaged: {name} is no tensor of {value.dtype}.")
            if stored.shape != value.shape:
                raise MismatchError(
                    f"What is stored is of another network: {name} is {tuple(stored.shape)}, not {tuple(value.shape)}."
                )

    def _follow_network(self) -> None:
        """Update what depends on the network's parameters."""
        self.base.follow_values()
        if not self.base.types_changed:  # else the same weights have other bits
            self.identity["network"] = self.base.checksum(self.layout.names)

    def _apply(self, fn, recurse=True):
        # `.to()` of the whole module. A type (half, double) is the network's alone: scores and masks stay exact.
        self.network._apply(fn)
        super()._apply(lambda t: moved if (moved := fn(t)).dtype == t.dtype else t.to(moved.device), recurse)
        self.base.follow_types()
        return self


def _leave_out_base_weights(module: Method, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Base weights regrow from their seed; only their checksum is stored."""
    for name in module.network.state_dict():
        if not module._is_stored(name):
            del state_dict[f"{prefix}network.{name}"]


def _check_and_fill_in(
    module: Method, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *_: Any
) -> None:
    """Check a state before it is loaded, and fill in what checkpoints leave out."""
    network = f"{prefix}network."
    own = module.network.state_dict()
    if module.gate is None and (sums := [name for name in state_dict if name.startswith(f"{prefix}gate.")]):
        logger.warning("What is stored also has sums for inference=discriminant, which are left out here.")
        for name in sums:
            del state_dict[name]
    parameters = {name: state_dict[network + name] for name in own if network + name in state_dict}
    if f"{prefix}_extra_state" in state_dict:
        extra = state_dict[f"{prefix}_extra_state"]
        if not (isinstance(extra, Mapping) and isinstance(extra.get("identity"), Mapping)):
            raise DataError("What is stored of the method is damaged: it does not say what it was made with.")
        module._check_identity(extra["identity"], "The checkpoint", parameters)
        _take_older_names(state_dict, prefix, extra)
    module._fill_in(state_dict, prefix)
    if module.gate is not None:
        module.gate.fill_in(state_dict, f"{prefix}gate.")
    for name, value in own.items():
        state_dict.setdefault(network + name, value)
    module._check_state(codec.under(prefix, state_dict), strict=strict)


def _take_older_names(state_dict: dict[str, Any], prefix: str, extra: Mapping[str, Any]) -> None:
    """Checkpoints before version 0.2 had what is in training under the method's own names, a single row as a vector."""
    for older, name in (("scores", "values"), ("values", "values"), ("statistics", "statistics")):
        stored = state_dict.pop(f"{prefix}{older}", None)
        if stored is not None:
            vector = isinstance(stored, Tensor) and stored.ndim == 1
            state_dict[f"{prefix}live.{name}"] = stored.unsqueeze(0) if vector else stored
    values = state_dict.get(f"{prefix}live.values")
    if isinstance(values, Tensor) and values.ndim == 2:  # a method without statistics stored none
        state_dict.setdefault(f"{prefix}live.statistics", values.new_zeros(len(values), 0))
    single, together = extra.get("task_in_training"), extra.get("together") or ()
    tasks = together if single is None else (single,)
    state_dict.setdefault(f"{prefix}live._extra_state", {"tasks": tasks})


def _follow(module: Method, _: Any) -> None:
    """Update what depends on the network after its values were loaded."""
    module._follow_network()
