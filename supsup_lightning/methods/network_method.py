"""What methods share that learn beside one network, which is only read: what identifies it, and the file."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from supsup_lightning.bank import codec
from supsup_lightning.bank.rows import check_tensor, same_kind
from supsup_lightning.checks.meaning import meaning
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError, check_choice
from supsup_lightning.layout import Layout
from supsup_lightning.masks import WEIGHT_INITIALISERS
from supsup_lightning.methods.conventions import Conventions, keep_padding, normalised_by_images, wide
from supsup_lightning.methods.method import Method
from supsup_lightning.seeding import generator


class NetworkMethod(Method):
    """One network that is only read, and what is learned beside it.

    Base weights regrow from their seed, or come with the network. A checksum stands for them in checkpoints and files,
    and refuses any others; what does not regrow (biases, constant buffers) is small and stored.

    Args:
        network: any module. Its base weights are overwritten with random ones; none is trained in place.
        layout: of the parameters that a task has its own of.
        base: of the base weights; ``weights`` draws these.
        identified: names of the parameters whose values have to agree, as they are not stored and finished tasks need
            them.
        weights: one of `WEIGHT_INITIALISERS`, drawn from the seed; ``keep`` leaves the network's own.
        store_weights: put these parameters into checkpoints and files, too.
        seed: of everything random.

    Attributes:
        identity: options and checksum that a checkpoint or file has to share.
    """

    file_format: str
    mask_sizes: tuple[int, ...] = ()  # of layers, where what is kept is masks
    row_each: tuple[str, ...] = ()  # tensors in training that have a row for each of several tasks at once
    needs_base = True  # finished tasks compute with the network's own weights

    def __init__(
        self,
        network: nn.Module,
        *,
        layout: Layout,
        base: Layout,
        identified: tuple[str, ...],
        weights: str,
        store_weights: bool,
        seed: int,
    ) -> None:
        super().__init__()
        check_choice("method.weights", weights, (*WEIGHT_INITIALISERS, "keep"))
        without_values = [name for name, p in network.named_parameters() if p.is_meta]
        if without_values:
            raise ConfigurationError(
                f"{type(network).__name__} has parameters without values, on the device meta ({without_values[0]}); "
                "make it on another device, or call its to_empty(device='cpu') and initialise it."
            )
        self.network = network.requires_grad_(False)
        self.layout = layout
        self.base = base
        self.weights = weights
        self.statistics_layout = Layout.of_running_statistics(network)
        self.seed = seed
        self.store_weights = store_weights
        self._identified = identified
        self._regrown = {*_aliases(network, (*identified, *base.names)), *self.statistics_layout.names}
        if weights != "keep" and base.names:
            drawn = WEIGHT_INITIALISERS[weights](base.shapes, generator(seed, "weights"))
            self._set_parameters(base.split(drawn))
            keep_padding(network, {*base.names})
        self._conventions = Conventions(network)
        self._types_at_first = self._conventions.types
        self._constants = {name: buffer.clone() for name, buffer in self._constant_buffers()}
        self.identity = {"seed": str(seed), "weights": weights, "network": self._checksum()}
        self._register_state_dict_hook(_leave_out_base_weights)
        self.register_load_state_dict_pre_hook(_check_and_fill_in)
        self.register_load_state_dict_post_hook(_follow)

    # A task's life.

    def _check_training(self, task: int) -> None:
        """Raise `KeyError` where another task is in training, or none; and as `_check_buffers`."""
        if task != self.task_in_training:
            raise KeyError(f"Task {task} is not in training (task {self.task_in_training} is).")
        self._check_buffers()

    def _check_buffers(self) -> None:
        """Raise `ConfigurationError` where training changed a buffer of the network that is no running statistic."""
        for name, buffer in self._constant_buffers():
            if not torch.equal(buffer, self._constants.setdefault(name, buffer.clone()).to(buffer)):
                raise ConfigurationError(
                    f"Training changed the network's buffer {name}. Tasks would overwrite it for one another: only the "
                    "running statistics of normalisation layers (running_mean, running_var) are kept for each task. "
                    "Make it constant, or leave out what changes it (spectral normalisation, say)."
                )

    def forward_superposed(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits; a normalisation layer without running statistics takes the batch's, in evaluation as well."""
        without: dict[str, Any] = dict.fromkeys(self.statistics_layout.names)
        with normalised_by_images(self.network):
            return super().forward_superposed({**parameters, **without}, images)

    def call_network(self, parameters: dict[str, Any], images: Tensor) -> Tensor:
        """Logits, in float32 at least; running statistics among the parameters are updated in place in training."""
        given = self.given(parameters)
        logits = functional_call(self.network, given, (self.given_images(images),), tie_weights=False)
        for name in self._conventions.types:
            if name in self.statistics_layout.names and parameters.get(name) is not None:
                parameters[name].copy_(given[name])
        return wide(logits)

    def given(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """These parameters in the types and places of the network's own; embeddings may rescale theirs."""
        return self._conventions.of(self.network, parameters)

    def given_images(self, images: Tensor) -> Tensor:
        """These images in the type of the network's parameters, where they have one."""
        return self._conventions.images(images)

    def _fresh_statistics(self) -> Tensor:
        """What the network came with: zeros and ones, or a pretrained network's; ``(statistics,)``."""
        if not self.statistics_layout.names:
            return torch.empty(0, dtype=torch.float32, device=next(self.network.parameters()).device)
        buffers = dict(self.network.named_buffers())
        return self.statistics_layout.flatten({name: buffers[name].float() for name in self.statistics_layout.names})

    def _statistics_in_training(self, statistics: Tensor) -> dict[str, Tensor]:
        """By name, for layers to update in place."""
        # `.data`: each part under a version counter of its own.
        return {name: part.data for name, part in self.statistics_layout.split(statistics).items()}

    def _average_statistics(self, statistics: Tensor) -> None:
        """Over processes, each of which has seen its share of every batch; in place."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(statistics)
            statistics /= torch.distributed.get_world_size()

    def _apply(self, fn, recurse=True):
        # `.to()` of the whole module. A type (half, double) is the network's alone: scores and masks stay exact.
        self.network._apply(fn)
        super()._apply(lambda t: moved if (moved := fn(t)).dtype == t.dtype else t.to(moved.device), recurse)
        self._conventions = Conventions(self.network)
        return self

    # What is kept.

    def kept(self) -> dict[str, Tensor]:
        """What is learned, the network's parameters that no seed regrows, and the seed where one does."""
        state = self.network.state_dict()
        parameters = {name: p for name, p in state.items() if self._is_stored(name) and self._is_needed(name)}
        seed = {"seed": torch.tensor(self.seed)} if self.needs_seed else {}
        return {**self._learned(), **codec.prefixed("parameters.", parameters), **seed}

    def kept_elsewhere(self) -> int:
        """Bytes of the network's own weights, where these are needed and no file of this package has them."""
        if self.weights != "keep" or self.store_weights or not self.needs_base:
            return 0
        parameters = dict(self.network.named_parameters())
        return sum(parameters[name].nbytes for name in self._identified if self._is_needed(name))

    @property
    def needs_seed(self) -> bool:
        """Whether finished tasks need what the seed makes."""
        return self.needs_base and self.weights != "keep" and not self.store_weights

    def save(self, path: str | Path) -> None:
        """Write what is kept, and what identifies network, seed and options."""
        codec.write(path, self.kept(), file_format=self.file_format, identity=self.identity, mask_sizes=self.mask_sizes)

    def load(self, path: str | Path) -> None:
        """Replace what is learned by a file's.

        Raises:
            MismatchError: another network or options made it. Nothing is replaced then.
            DataError: it is damaged. Nothing is replaced then.
        """
        learned, parameters = self._read(path)
        self._set_parameters(parameters)
        self._set_learned(learned)
        self._follow_network()

    @abstractmethod
    def _learned(self) -> dict[str, Tensor]:
        """What a file holds of the finished tasks."""

    @abstractmethod
    def _check_learned(self, tensors: dict[str, Tensor]) -> None:
        """Raise `DataError` or `MismatchError` unless these are what `_learned` gives for some number of tasks."""

    @abstractmethod
    def _set_learned(self, tensors: dict[str, Tensor]) -> None:
        """From what `_learned` gave."""

    def _read(self, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is learned, and the network's parameters, of a file that belongs to this configuration."""
        tensors, identity = codec.read(path, file_format=self.file_format, mask_sizes=self.mask_sizes)
        parameters = codec.under("parameters.", tensors)
        self._check_identity(identity, f"The file {path}", parameters)
        own = self.network.state_dict()
        needed = {name for name in own if name not in self._regrown and self._is_needed(name)}
        learned = {name: value for name, value in tensors.items() if not name.startswith("parameters.")}
        seed = learned.pop("seed", None)
        try:
            if missing := needed - parameters.keys():
                raise DataError(f"it lacks the network's {', '.join(sorted(missing))}")
            for name, value in parameters.items():
                check_tensor(parameters, name, own[name], "parameter")
                if value.dtype != own[name].dtype and not value.is_floating_point():
                    raise DataError(f"{name} is {value.dtype}")
            if seed is None and self.needs_seed and not {*self._identified} <= parameters.keys():
                raise DataError("it lacks the seed")
            if seed is not None and (seed.dtype != torch.int64 or not torch.equal(seed, torch.tensor(self.seed))):
                raise DataError(f"its seed is not {self.seed}")
            self._check_learned(learned)
        except DataError as error:
            raise DataError(f"The file {path} is refused: {error}") from error
        return learned, parameters

    def get_extra_state(self) -> dict[str, Any]:
        """The identity, and the task in training; into `state_dict`."""
        return {"identity": self.identity, "task_in_training": self.task_in_training}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`; the identity was checked before anything was loaded."""
        self.task_in_training = state["task_in_training"]

    # The network, which is only ever read.

    def _is_stored(self, name: str) -> bool:
        return self.store_weights or name not in self._regrown

    def _is_needed(self, name: str) -> bool:
        """Whether finished tasks compute with this parameter or buffer of the network's own."""
        return name not in self.statistics_layout.names

    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        own = self.network.state_dict()
        for name, value in values.items():
            own[name].copy_(value)

    def _constant_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, b) for name, b in self.network.named_buffers() if name not in self.statistics_layout.names]

    def _checksum(self, weights: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 over names and shapes of all parameters, which are a task's own, and values of these and the base."""
        parameters = dict(self.network.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        digest = hashlib.sha256(repr((self.layout.names, shapes)).encode())
        for name in self._identified:
            weight = (weights or parameters)[name]
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _check_identity(self, stored: Mapping[str, str], source: str, parameters: Mapping[str, Tensor]) -> None:
        """Raise `MismatchError` unless ``stored`` is this configuration; with weights of its own, they may differ."""
        shapes = {name: p.shape for name, p in self.network.state_dict().items()}
        fits = all(name in shapes and shapes[name] == value.shape for name, value in parameters.items())
        own_weights = fits and all(name in parameters for name in self._identified)
        expected = {**self.identity, "network": self._checksum(parameters) if own_weights else self.identity["network"]}
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

    def _fill_in(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Put in what a checkpoint need not have."""

    def _check_state(self, state: dict[str, Any], *, strict: bool) -> None:
        """Raise `DataError` or `MismatchError` where a state is not one of this method's, before any of it is loaded.

        Args:
            state: with what was left out, by names within the method.
            strict: nothing may be missing, and nothing there that is not the method's.
        """
        own = self.state_dict()
        names = {*own, *(f"network.{name}" for name in self.network.state_dict())}
        if strict and state.keys() != names:
            missing, extra = sorted(names - state.keys()), sorted(state.keys() - names)
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
            start = -1 if name in self.row_each else 0
            if not isinstance(stored, Tensor) or not same_kind(stored, value):
                raise DataError(f"What is stored is damaged: {name} is no tensor of {value.dtype}.")
            if stored.shape[start:] != value.shape[start:]:
                raise MismatchError(
                    f"What is stored is of another network: {name} is {tuple(stored.shape)}, not {tuple(value.shape)}."
                )

    def _make_room_for(self, state: dict[str, Any]) -> None:
        """For as much in training as a state has, which was checked."""

    def _follow_network(self) -> None:
        """What is derived from the network's parameters follows them."""
        self._constants = {name: buffer.clone() for name, buffer in self._constant_buffers()}
        if self._conventions.types == self._types_at_first:  # else the same weights have other bits
            self.identity["network"] = self._checksum()


def _leave_out_base_weights(
    module: NetworkMethod, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """They regrow from their seed; only their checksum is stored."""
    for name in module.network.state_dict():
        if not module._is_stored(name):
            del state_dict[f"{prefix}network.{name}"]


def _check_and_fill_in(
    module: NetworkMethod, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *_: Any
) -> None:
    """Put in what was left out, for strict loading; refuse a foreign or damaged state before any of it is loaded."""
    network = f"{prefix}network."
    own = module.network.state_dict()
    parameters = {name: state_dict[network + name] for name in own if network + name in state_dict}
    module._fill_in(state_dict, prefix)
    if f"{prefix}_extra_state" in state_dict:
        extra = state_dict[f"{prefix}_extra_state"]
        if not (
            isinstance(extra, Mapping)
            and isinstance(extra.get("identity"), Mapping)
            and isinstance(extra.get("task_in_training", ""), int | None)
            and isinstance(extra.get("together", ()), list | tuple)
        ):
            raise DataError("What is stored of the method is damaged: it does not say what it was made with.")
        module._check_identity(extra["identity"], "The checkpoint", parameters)
    for name, value in own.items():
        state_dict.setdefault(network + name, value)
    state = codec.under(prefix, state_dict)
    module._check_state(state, strict=strict)
    module._make_room_for(state)


def _follow(module: NetworkMethod, _: Any) -> None:
    """What is derived from the network follows what was loaded."""
    module._follow_network()


def _aliases(network: nn.Module, names: Sequence[str]) -> list[str]:
    """All names of these parameters: tied ones have several."""
    parameters = dict(network.named_parameters())
    chosen = {id(parameters[name]) for name in names}
    return [name for name, p in network.named_parameters(remove_duplicate=False) if id(p) in chosen]
