"""Classification models of torchvision by name, and the paper's ResNet-50."""

import pickle
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.resnet import Bottleneck

from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.networks.names import check_name
from supsup_lightning.recipe.recorded import recorded

# In training, these models also return the outputs of auxiliary heads, which no loss here uses.
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


@recorded
def torchvision_model(
    *,
    name: str,
    output_size: int,
    input_shape: Sequence[int] = (3, 224, 224),
    weights: str | None = None,
    affine: bool = True,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Make any classification model of torchvision, with ``output_size`` outputs.

    Args:
        name: name as in ``torchvision.models.list_models(module=torchvision.models)``.
        output_size: number of outputs; those beyond the classes are not used.
        input_shape: shape of one image, ``(channels, height, width)``. If it does not have 3 channels, the first
            convolution is replaced by one with the same settings. Vision transformers and MaxViT are built for this
            height and width.
        weights: None for random ones; an entry of torchvision's weights for this model, such as ``DEFAULT`` or
            ``IMAGENET1K_V1``, which is downloaded once; or the path of a file with a ``state_dict``. Only the head,
            the last layer, may differ from the model's; it then stays random.
        affine: False removes gains and biases from BatchNorm, as in the paper.
        options: further arguments of torchvision's builder, such as ``{"dropout": 0.1}``. The auxiliary heads of
            googlenet and inception_v3 are left out unless ``aux_logits`` is given here.

    Returns:
        A module from ``(batch, *input_shape)`` to ``(batch, output_size)``.

    Raises:
        ConfigurationError: no such model or weights, options or an ``input_shape`` that the model cannot be built
            with, weights that do not fit it, or ``affine=False`` without BatchNorm.
        DataError: weights that cannot be downloaded or read.

    >>> network = torchvision_model(name="squeezenet1_1", output_size=5, input_shape=(1, 32, 32))
    >>> network(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 5])
    """
    check_name(name, list_models(module=torchvision.models), library="torchvision")
    source = None if weights is None else _weights_source(name, weights)
    if isinstance(source, WeightsEnum) and input_shape[0] != 3:
        raise ConfigurationError(
            f"network.weights={weights} needs images of 3 channels, and network.input_shape={list(input_shape)} has "
            f"{input_shape[0]}. {_THREE_CHANNELS}, or leave the weights random with network.weights=null."
        )
    settings = {**_defaults(name, input_shape, source), **options}
    try:
        network = get_model(name, weights=None, num_classes=output_size, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"network.name={name} cannot be built with network.options={dict(options)} and "
            f"network.input_shape={list(input_shape)} ({error}). Change the options, or the images (data.input_shape)."
        ) from error
    _set_input_channels(network, input_shape[0])
    if not affine:
        _remove_gains_and_biases(network, name)
    if isinstance(source, WeightsEnum):
        _take(_downloaded(name, source), network, f"network.weights={weights}")
    elif source is not None:
        _take(_read(source), network, f"network.weights={weights}")
    return network


@recorded
class ResNet50(torchvision.models.ResNet):
    """torchvision's ResNet-50 as in the paper (section 4): without biases, and without gains in BatchNorm.

    Args:
        output_size: number of outputs; those beyond the classes are not used.
        input_shape: shape of one image, ``(channels, height, width)``. Only the channels matter: the network pools
            over the remaining height and width, 1/32 of the image's.

    >>> network = ResNet50(output_size=10)
    >>> {parameter.ndim for parameter in network.parameters()}  # convolutions and one linear layer
    {2, 4}
    """

    def __init__(self, *, output_size: int, input_shape: Sequence[int] = (3, 224, 224)) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3], num_classes=output_size)
        self.fc = nn.Linear(512 * Bottleneck.expansion, output_size, bias=False)
        _set_input_channels(self, input_shape[0])
        _remove_gains_and_biases(self, "ResNet50")


# The model.


def _defaults(name: str, input_shape: Sequence[int], source: WeightsEnum | Path | None) -> dict[str, Any]:
    """Return arguments of torchvision's builder that depend on the model, the images and the weights."""
    height, width = input_shape[1:]
    if name in WITH_AUXILIARY_HEADS:
        # Published weights were trained with another normalisation of images; transform_input converts to it.
        published = isinstance(source, WeightsEnum)
        return {"aux_logits": False, "init_weights": source is None, "transform_input": published}
    if name.startswith("vit_"):
        if height != width:
            raise ConfigurationError(
                f"network.name={name} needs square images, and network.input_shape={list(input_shape)} is not; "
                "resize the images (data.input_shape)."
            )
        return {"image_size": height}
    if name.startswith("maxvit_"):
        return {"input_size": (height, width)}
    return {}


def _set_input_channels(network: nn.Module, channels: int) -> None:
    """Give the first convolution this number of input channels; a new convolution is random."""
    path, old = next((path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    if old.in_channels == channels:
        return
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        dilation=old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    network.set_submodule(path, new)


def _remove_gains_and_biases(network: nn.Module, name: str) -> None:
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        raise ConfigurationError(
            f"network.affine=false has no effect on network.name={name}, which has no BatchNorm; use "
            "network.affine=true."
        )
    for layer in layers:
        layer.affine = False
        layer.register_parameter("weight", None)
        layer.register_parameter("bias", None)


# The weights.

_THREE_CHANNELS = "Use data that give 3 channels, e.g. data.resize=true with data.input_shape=[3,224,224]"


def _weights_source(name: str, weights: str) -> WeightsEnum | Path:
    """Return an entry of torchvision's weights, or the path of a file. Raises `ConfigurationError`."""
    entries = get_model_weights(name)
    if weights in entries.__members__:
        return entries[weights]
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"network.weights={weights!r} is neither weights that torchvision has for {name} "
            f"({', '.join(entries.__members__) or 'none'}) nor a file; name one of these, or null for random weights."
        )
    return path


def _downloaded(name: str, entry: WeightsEnum) -> MutableMapping[str, Tensor]:
    """Download weights by torchvision's own builder, which converts the names in files of older models."""
    try:
        return get_model(name, weights=entry, progress=False).state_dict()
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"network.weights={entry.name} of {name} could not be downloaded or read ({error}). Download {entry.url} "
            f"where there is a connection and put the file into {torch.hub.get_dir()}/checkpoints (replacing a damaged "
            "one there), or leave the weights random with network.weights=null."
        ) from error


def _read(path: Path) -> MutableMapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        refused = isinstance(error, pickle.UnpicklingError)  # PyTorch's text says how to read it in spite of that
        reason = "it holds Python objects, which could run any program, or is damaged" if refused else error
        raise DataError(
            f"network.weights={path} cannot be read ({reason}); write the file with "
            "`torch.save(network.state_dict(), path)`."
        ) from error
    if not isinstance(state, MutableMapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(
            f"network.weights={path} is not a state_dict, which has a tensor for each name; write the file with "
            "`torch.save(network.state_dict(), path)`."
        )
    return state


def _take(state: MutableMapping[str, Tensor], network: nn.Module, option: str) -> None:
    """Load ``state`` into ``network``; only the head may differ.

    Raises:
        ConfigurationError: another parameter or running statistic is missing on either side, or differs in shape.
    """
    own = network.state_dict()
    head = [path for path, layer in network.named_modules() if getattr(layer, "weight", None) is not None][-1] + "."
    absent = [f"{name} {tuple(own[name].shape)}" for name in own if name not in state and _must_fit(name, head)]
    surplus = [f"{name} {tuple(state[name].shape)}" for name in state if name not in own and _must_fit(name, head)]
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape and _must_fit(name, head)
    ]
    kinds = (("are missing", absent), ("are unknown to the network", surplus), ("differ in shape", other))
    problems = [f"{len(names)} {problem}: {_shortened(names)}" for problem, names in kinds if names]
    if problems:
        raise ConfigurationError(
            f"{option} does not fit the network: {'; '.join(problems)}. Use weights of the same network.name, "
            "network.options, network.affine and image size; only the head may differ. If the first convolution "
            f"differs: {_THREE_CHANNELS}."
        )
    for name in [name for name in state if name not in own or state[name].shape != own[name].shape]:
        del state[name]  # from the mapping itself, as its metadata tell older layers how to load
    network.load_state_dict(state, strict=False)


def _must_fit(name: str, head: str) -> bool:
    """Whether a tensor must fit: not in the head or in auxiliary heads, and not a count of batches (unused)."""
    return not name.startswith((head, *AUXILIARY_HEADS)) and not name.endswith(".num_batches_tracked")


def _shortened(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
