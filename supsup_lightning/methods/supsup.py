"""SupSup: a task is a binary mask over the frozen weights of one network (section 3 of the paper)."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supsup_lightning import codec
from supsup_lightning.bank import MaskBank
from supsup_lightning.errors import MismatchError, check_choice
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
        store_weights: put the network's parameters into checkpoints and bank files. Otherwise they hold a checksum
            that refuses another network.
        seed: of weights and scores.

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
            self._set_network(self.layout.split(drawn))
        self.register_buffer("frozen", self._flat_network(), persistent=False)
        self.identity = {
            "network": self._checksum(),
            "rule": rule,
            "sparsity": str(sparsity),
            "allocation": allocation if rule == "topk" else "none",
            "weights": weights,
            "seed": str(seed),
        }
        self._stored_identity: dict[str, str] | None = None
        self._register_state_dict_hook(_leave_out_network)
        self.register_load_state_dict_pre_hook(_fill_in_network)
        self.register_load_state_dict_post_hook(_check_loaded)

    # A task's life.

    def begin_task(self, task: int) -> None:
        """Fresh scores, drawn from (seed, task)."""
        if task in self.bank:
            raise KeyError(f"Task {task} is finished; its mask is in the bank.")
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
        """Write the bank, with what identifies network, seed and rule; and the weights, under ``store_weights``."""
        weights = dict(self.network.named_parameters()) if self.store_weights else {}
        codec.write(path, packed=self.bank.packed, tasks=self.bank.tasks, identity=self.identity, weights=weights)

    def load(self, path: str | Path) -> None:
        """Replace the bank by a file's. Raises `MismatchError` if it was made with another network, seed or rule."""
        stored = codec.read(path)
        if not stored.weights:
            self._check_identity(stored.identity, str(path))
        else:
            self._check_identity({**stored.identity, "network": self.identity["network"]}, str(path))
            self._set_network(stored.weights)
            self._adopt_network()
            self._check_identity(stored.identity, str(path))
        self.bank.load_state_dict({"packed": stored.packed, "tasks": stored.tasks})

    def get_extra_state(self) -> dict[str, Any]:
        """The identity of network, seed and rule, and the task in training; into `state_dict`."""
        return {"identity": self.identity, "task_in_training": self.task_in_training}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Counterpart of `get_extra_state`; the identity is checked once the network's parameters are loaded too."""
        self._stored_identity = state["identity"]
        self.task_in_training = state["task_in_training"]

    # The network, which is only ever read.

    def _set_network(self, values: dict[str, Tensor]) -> None:
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    def _flat_network(self) -> Tensor:
        parameters = dict(self.network.named_parameters())
        return self.layout.flatten({name: parameters[name].detach() for name in self.layout.names})

    def _adopt_network(self) -> None:
        self.frozen.copy_(self._flat_network())
        self.identity["network"] = self._checksum()

    def _checksum(self) -> str:
        """SHA-256 over names, shapes and values of all parameters, the unmasked ones included, and which are masked."""
        digest = hashlib.sha256(repr(self.layout.names).encode())
        for name, parameter in self.network.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _check_identity(self, stored: dict[str, str], source: str) -> None:
        differences = [
            f"{key} {stored.get(key)!r} there, {value!r} here"
            for key, value in self.identity.items()
            if stored.get(key) != value
        ]
        if differences:
            raise MismatchError(
                f"{source} does not belong to this configuration: {'; '.join(differences)}. "
                "Use the network, seed and mask options that it was made with, or start afresh without it."
            )


def _leave_out_network(module: SupSup, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The weights regrow from their seed; only the checksum is stored."""
    if not module.store_weights:
        for name, _ in module.network.named_parameters():
            del state_dict[f"{prefix}network.{name}"]


def _fill_in_network(module: SupSup, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What was left out is what this module has, so that strict loading finds every key."""
    for name, parameter in module.network.named_parameters():
        state_dict.setdefault(f"{prefix}network.{name}", parameter)


def _check_loaded(module: SupSup, _: Any) -> None:
    if module._stored_identity is not None:
        module._adopt_network()
        stored, module._stored_identity = module._stored_identity, None
        module._check_identity(stored, "The checkpoint")
