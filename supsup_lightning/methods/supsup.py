"""SupSup: a task is a binary mask over the frozen weights of one network (section 3 of the paper)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning import codec
from supsup_lightning.bank import MaskBank
from supsup_lightning.errors import ConfigurationError, MismatchError, check_choice
from supsup_lightning.layout import Layout, MaskRule, at_least_two_dimensions
from supsup_lightning.masks import (
    ALLOCATIONS,
    WEIGHT_INITIALISERS,
    kaiming_uniform_scores,
    make_rule,
    masked_weights,
)
from supsup_lightning.methods.method import Method
from supsup_lightning.seeding import generator


class SupSup(Method):
    """One frozen network, one mask a task.

    Args:
        network: any module. Its masked weights are overwritten with random ones (``weights``); none is trained.
        rule: ``threshold`` (on where the score is not negative) or ``topk`` (a fixed share of each layer is on).
        sparsity: with ``topk``, the share of weights switched off, in [0, 1).
        allocation: with ``topk``, how layers share it: ``uniform`` or ``erdos_renyi``.
        weights: the base weights: ``signed_constant`` or ``kaiming_normal``, regrown from the seed; ``keep`` leaves the
            network's own (pretrained, say).
        is_masked: which parameters are masked, from name and tensor; by default those of two or more dimensions.
        store_weights: put the masked weights into checkpoints and bank files, too. Otherwise these hold a checksum
            that refuses other weights. Parameters that are not masked (biases, say) are small and always stored.
        seed: of weights and scores.

    Raises:
        ConfigurationError: an option out of its range, or a network without a weight to mask, or with running
            statistics.

    >>> method = SupSup(nn.Linear(4, 2, bias=False))
    >>> method.begin_task(0)
    >>> method(torch.ones(1, 4), 0).shape
    torch.Size([1, 2])
    >>> method.finish_task(0)
    >>> len(method.bank), method.task_bytes()
    (1, 1)
    """

    frozen: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        rule: str = "threshold",
        sparsity: float | None = None,
        allocation: str = "uniform",
        weights: str = "signed_constant",
        is_masked: MaskRule = at_least_two_dimensions,
        store_weights: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("mask.rule", rule, ("threshold", "topk"))
        check_choice("mask.allocation", allocation, tuple(ALLOCATIONS))
        check_choice("method.weights", weights, (*WEIGHT_INITIALISERS, "keep"))
        _refuse_running_statistics(network)
        self.network = network.requires_grad_(False)
        self.layout = Layout.of(network, is_masked)
        self.rule = make_rule(rule, self.layout.shapes, sparsity, allocation)
        self.seed = seed
        self.store_weights = store_weights
        self.bank = MaskBank(self.layout.num_weights)
        self.scores = nn.Parameter(torch.zeros(self.layout.num_weights))
        self.task_in_training: int | None = None

        if weights != "keep":
            drawn = WEIGHT_INITIALISERS[weights](self.layout.shapes, generator(seed, "weights"))
            self._set_parameters(self.layout.split(drawn))
        self.register_buffer("frozen", self._flat_weights(), persistent=False)
        self.identity = {
            "seed": str(seed),
            "rule": rule,
            "sparsity": str(sparsity),
            "allocation": allocation if rule == "topk" else "none",
            "weights": weights,
            "network": self._checksum(),
        }
        self._register_state_dict_hook(_leave_out_masked_weights)
        self.register_load_state_dict_pre_hook(_check_and_fill_in)
        self.register_load_state_dict_post_hook(_read_off_network)

    # A task's life.

    def begin_task(self, task: int) -> None:
        """Fresh scores, drawn from (seed, task)."""
        if task in self.bank:
            raise ConfigurationError(
                f"Task {task} is finished and its mask is in the bank. To train anew, make a new method; to go "
                "on, resume from a checkpoint (ckpt_path); to train this task again, `bank.remove` it first."
            )
        fresh = kaiming_uniform_scores(self.layout.shapes, generator(self.seed, "scores", task))
        with torch.no_grad():
            self.scores.copy_(fresh)
        self.task_in_training = task

    def finish_task(self, task: int) -> None:
        """Commit the mask of the scores to the bank."""
        if task != self.task_in_training:
            raise KeyError(f"Task {task} is not in training (task {self.task_in_training} is).")
        self.bank.add(task, self.rule(self.scores) > 0)
        self.task_in_training = None

    def trainable(self) -> list[nn.Parameter]:
        """The scores, ``(weights,)``."""
        return [self.scores]

    def effective(self, task: int) -> dict[str, Tensor]:
        """``W * M_task``: differentiable in the scores while the task is in training, from the bank afterwards."""
        if task == self.task_in_training:
            return self.layout.split(masked_weights(self.scores, self.frozen, self.rule))
        return self.layout.split(self.bank.get(task) * self.frozen)

    # Superposition.

    @property
    def tasks(self) -> Tensor:
        """The finished tasks, ``(k,)`` int64."""
        return self.bank.tasks

    def superposed(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """``W * sum_i a_i M_i``."""
        return self.layout.split(self.bank.superpose(coefficients) * self.frozen)

    def project(self, gradients: dict[str, Tensor]) -> Tensor:
        """``dO/da_i = <dO/dW_a * W, M_i>``: one inner product a mask, ``(*batch, k)``."""
        batch_dims = next(iter(gradients.values())).ndim - len(self.layout.shapes[0])
        return self.bank.project(self.layout.flatten(gradients, batch_dims=batch_dims) * self.frozen)

    # What is kept.

    def sparsity(self) -> Tensor:
        """Measured share of weights that each mask switches off, ``(k,)``."""
        return self.bank.sparsity()

    def task_bytes(self) -> int:
        """One bit a weight."""
        return self.bank.packed.shape[1]

    def save(self, path: str | Path) -> None:
        """Write the bank, what identifies network, seed and rule, and the parameters that no seed regrows."""
        parameters = {name: p for name, p in self.network.named_parameters() if self._is_stored(name)}
        codec.write(path, packed=self.bank.packed, tasks=self.bank.tasks, identity=self.identity, parameters=parameters)

    def load(self, path: str | Path) -> None:
        """Replace the bank by a file's. Raises `MismatchError` if it was made with another network, seed or rule."""
        stored = codec.read(path)
        self._check_identity(stored.identity, f"The mask bank {path}", stored.parameters)
        self._set_parameters(stored.parameters)
        self.bank.load_state_dict({"packed": stored.packed, "tasks": stored.tasks})
        _read_off_network(self)

    def get_extra_state(self) -> dict[str, Any]:
        """The identity of network, seed and rule, and the task in training; into `state_dict`."""
        return {"identity": self.identity, "task_in_training": self.task_in_training}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`; the identity was checked before anything was loaded."""
        self.task_in_training = state["task_in_training"]

    # The network, which is only ever read.

    def _is_stored(self, name: str) -> bool:
        """Masked weights regrow from their seed (or come with the network); other parameters are small and stored."""
        return self.store_weights or name not in self.layout.names

    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    def _flat_weights(self) -> Tensor:
        parameters = dict(self.network.named_parameters())
        return self.layout.flatten({name: parameters[name].detach() for name in self.layout.names})

    def _checksum(self, weights: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 over names and shapes of all parameters, which are masked, and the masked ones' values."""
        parameters = dict(self.network.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        digest = hashlib.sha256(repr((self.layout.names, shapes)).encode())
        for name in self.layout.names:
            weight = (weights or parameters)[name]
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _check_identity(self, stored: Mapping[str, str], source: str, parameters: Mapping[str, Tensor]) -> None:
        """Raise `MismatchError` unless ``stored`` is this configuration; with weights of its own, they may differ."""
        shapes = {name: p.shape for name, p in self.network.named_parameters()}
        fits = all(name in shapes and shapes[name] == value.shape for name, value in parameters.items())
        own_weights = fits and all(name in parameters for name in self.layout.names)
        expected = {**self.identity, "network": self._checksum(parameters) if own_weights else self.identity["network"]}
        differences = [
            f"{key} {stored.get(key)!r} there, {value!r} here"
            if key != "network"
            else "another network or other weights"
            for key, value in expected.items()
            if stored.get(key) != value
        ]
        if differences or not fits:
            raise MismatchError(
                f"{source} does not belong to this configuration: {'; '.join(differences) or 'another network'}. "
                "Use the network, seed and mask options that it was made with, or start afresh without it."
            )


def _leave_out_masked_weights(module: SupSup, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """They regrow from their seed; only their checksum is stored."""
    for name, _ in module.network.named_parameters():
        if not module._is_stored(name):
            del state_dict[f"{prefix}network.{name}"]


def _check_and_fill_in(module: SupSup, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a foreign state before any of it is loaded; then put in what was left out, for strict loading."""
    network = f"{prefix}network."
    parameters = {
        name: state_dict[network + name]
        for name, _ in module.network.named_parameters()
        if network + name in state_dict
    }
    extra = state_dict.get(f"{prefix}_extra_state")
    if extra is not None:
        module._check_identity(extra["identity"], "The checkpoint", parameters)
    for name, parameter in module.network.named_parameters():
        state_dict.setdefault(network + name, parameter)


def _read_off_network(module: SupSup, _: Any = None) -> None:
    """What is derived from the network's parameters follows them."""
    module.frozen.copy_(module._flat_weights())
    module.identity["network"] = module._checksum()


def _refuse_running_statistics(network: nn.Module) -> None:
    for name, layer in network.named_modules():
        if getattr(layer, "running_mean", None) is not None:
            raise ConfigurationError(
                f"The layer {name} ({type(layer).__name__}) keeps running statistics, which tasks would overwrite "
                "for one another; give it track_running_stats=False, so that it normalises by the batch."
            )
