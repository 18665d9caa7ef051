"""A network that is never changed: calls it with other parameters, and identifies it by a checksum."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from supsup_lightning.errors import ConfigurationError, check_choice
from supsup_lightning.layout import Layout
from supsup_lightning.masks import WEIGHT_INITIALISERS
from supsup_lightning.methods.conventions import Conventions, keep_padding, normalised_by_images, wide
from supsup_lightning.methods.recompute import keep_for_backward
from supsup_lightning.seeding import generator


class BaseNetwork:
    """A network whose parameters are replaced for the length of one call, and never trained in place.

    Args:
        network: any module. Its ``drawn`` weights are overwritten with random ones.
        drawn: layout of the weights that are drawn from the seed.
        identified: names of the parameters whose values have to agree where finished tasks are loaded, as no file
            stores them.
        weights: one of `WEIGHT_INITIALISERS`, or ``keep`` for the network's own.
        seed: of the drawn weights.

    Attributes:
        statistics_layout: layout of the running statistics of normalisation layers.
        regrown: names of parameters and buffers that no file needs: they come from the seed, or belong to a task.

    Raises:
        ConfigurationError: unknown ``weights``, or parameters without values.
    """

    def __init__(
        self, network: nn.Module, *, drawn: Layout, identified: Sequence[str], weights: str, seed: int
    ) -> None:
        check_choice("method.weights", weights, (*WEIGHT_INITIALISERS, "keep"))
        without_values = [name for name, p in network.named_parameters() if p.is_meta]
        if without_values:
            raise ConfigurationError(
                f"{type(network).__name__} has parameters without values, on the device meta ({without_values[0]}); "
                "make it on another device, or call its to_empty(device='cpu') and initialise it."
            )
        self.network = network.requires_grad_(False)
        self.drawn = drawn
        self.identified = tuple(identified)
        self.statistics_layout = Layout.of_running_statistics(network)
        self.regrown = {*_aliases(network, (*identified, *drawn.names)), *self.statistics_layout.names}
        if weights != "keep" and drawn.names:
            self.set_parameters(drawn.split(WEIGHT_INITIALISERS[weights](drawn.shapes, generator(seed, "weights"))))
            keep_padding(network, {*drawn.names})
        self.conventions = Conventions(network)
        self._types_at_first = self.conventions.types
        self._channels_last: bool | None = None  # unknown before the first images
        self._constants = {name: buffer.clone() for name, buffer in self._constant_buffers()}

    # Calls.

    def call(self, parameters: dict[str, Any], images: Tensor) -> Tensor:
        """Logits ``(batch, output_size)``, in float32 at least, with these parameters in place of the network's own.

        Running statistics among the parameters are updated in place in training mode.
        """
        given = self.given(parameters)
        logits = functional_call(self.network, given, (self.conventions.images(images),), tie_weights=False)
        for name in self.conventions.types:
            if name in self.statistics_layout.names and parameters.get(name) is not None:
                parameters[name].copy_(given[name])
        return wide(logits)

    def call_superposed(self, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits ``(batch, output_size)`` of a mixture of tasks, differentiable in the parameters.

        No task's running statistics apply: normalisation layers take the statistics of the batch, in evaluation mode
        too.
        """
        given: dict[str, Any] = {**parameters, **dict.fromkeys(self.statistics_layout.names)}
        with normalised_by_images(self.network):
            return keep_for_backward(self.call(given, images), self.network, lambda: self.given(given))

    def given(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """These parameters in the types and under all the names that the network has for them."""
        return self.conventions.of(self.network, parameters)

    def laid_out(self, images: Tensor) -> Tensor:
        """Images with channels last in memory, which is faster, if the network has convolutions and accepts them."""
        if images.ndim != 4 or self._channels_last is False or not len(images):
            return images
        laid_out = images.contiguous(memory_format=torch.channels_last)
        if self._channels_last is None:
            self._channels_last = has_convolutions(self.network) and self._takes(laid_out[:2])
            return self.laid_out(images)
        return laid_out

    def _takes(self, images: Tensor) -> bool:
        """Whether the network can compute with this memory layout; a `view` of a convolution's output cannot."""
        modes = {part: part.training for part in self.network.modules()}
        try:
            with torch.no_grad():
                self.network.eval()(images)
        except RuntimeError:
            return False
        finally:
            for part, training in modes.items():
                part.training = training
        return True

    # Running statistics.

    def fresh_statistics(self) -> Tensor:
        """Running statistics that the network came with, ``(statistics,)``."""
        if not self.statistics_layout.names:
            return torch.empty(0, dtype=torch.float32, device=next(self.network.parameters()).device)
        buffers = dict(self.network.named_buffers())
        return self.statistics_layout.flatten({name: buffers[name].float() for name in self.statistics_layout.names})

    def statistics_by_name(self, statistics: Tensor) -> dict[str, Tensor]:
        """``(*tasks, statistics)`` as one view per buffer, for layers to update in place."""
        # `.data`: each part under a version counter of its own.
        return {name: part.data for name, part in self.statistics_layout.split(statistics).items()}

    # Identity.

    @property
    def types_changed(self) -> bool:
        """Whether the network was converted to other number types (half, double) since it was given."""
        return self.conventions.types != self._types_at_first

    def check_constants(self) -> None:
        """Raise `ConfigurationError` if training changed a buffer that is no running statistic."""
        for name, buffer in self._constant_buffers():
            if not torch.equal(buffer, self._constants.setdefault(name, buffer.clone()).to(buffer)):
                raise ConfigurationError(
                    f"Training changed the network's buffer {name}. Tasks would overwrite it for one another: only the "
                    "running statistics of normalisation layers (running_mean, running_var) are kept for each task. "
                    "Make it constant, or leave out what changes it (spectral normalisation, say)."
                )

    def checksum(self, names: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 of the names a task has its own values of, of all shapes, and of the identified parameters' values.

        Args:
            names: parameters that a task has its own values of.
            weights: values to take in place of the network's own.
        """
        parameters = dict(self.network.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        digest = hashlib.sha256(repr((tuple(names), shapes)).encode())
        for name in self.identified:
            weight = (weights or parameters)[name]
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the network's parameters and buffers of these names."""
        own = self.network.state_dict()
        for name, value in values.items():
            own[name].copy_(value)

    def follow_types(self) -> None:
        """Read the network's types again after it was moved or converted."""
        self.conventions = Conventions(self.network)

    def follow_values(self) -> None:
        """Take the loaded values of buffers as constant from here on."""
        self._constants = {name: buffer.clone() for name, buffer in self._constant_buffers()}

    def _constant_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, b) for name, b in self.network.named_buffers() if name not in self.statistics_layout.names]


def has_convolutions(network: nn.Module) -> bool:
    """Whether any layer is a convolution over two dimensions."""
    return any(isinstance(layer, nn.Conv2d) for layer in network.modules())


def _aliases(network: nn.Module, names: Sequence[str]) -> list[str]:
    """All names of these parameters; tied parameters have several."""
    parameters = dict(network.named_parameters())
    chosen = {id(parameters[name]) for name in names}
    return [name for name, p in network.named_parameters(remove_duplicate=False) if id(p) in chosen]
