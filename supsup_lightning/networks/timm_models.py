"""Models of timm, PyTorch Image Models, by name; timm is an optional dependency."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from supsup_lightning.errors import ConfigurationError, DataError
from supsup_lightning.networks.names import check_name
from supsup_lightning.recipe.recorded import recorded


@recorded
def timm_model(
    *,
    name: str,
    output_size: int,
    input_shape: Sequence[int] = (3, 224, 224),
    pretrained: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:
    """Make any model of timm, with ``output_size`` outputs.

    Args:
        name: name as in ``timm.list_models()``, with or without the tag of its pretrained weights
            (``vit_tiny_patch16_224.augreg_in21k``), or with a source (``hf-hub:user/model``, ``local-dir:/folder``).
        output_size: number of outputs; those beyond the classes are not used.
        input_shape: shape of one image, ``(channels, height, width)``. A model for one image size, such as a vision
            transformer, is built for this size; with a source in its name, set ``options.img_size`` instead.
        pretrained: download timm's weights, once. timm adapts them to ``input_shape``, and the head is random unless
            it has as many outputs.
        options: further arguments of ``timm.create_model``, such as ``{"drop_path_rate": 0.1}``.

    Returns:
        A module from ``(batch, *input_shape)`` to ``(batch, output_size)``.

    Raises:
        ConfigurationError: timm is not installed, there is no such model, or it cannot be built with these options or
            for images of this shape.
        DataError: weights that cannot be downloaded or read.
    """
    try:
        import timm  # optional, and takes a second to import
    except ImportError as error:
        raise ConfigurationError(
            "network=timm needs the package timm, which is not installed: `pip install 'supsup-lightning[timm]'`."
        ) from error
    # timm itself checks the tag of pretrained weights and the source of a model.
    if ":" not in name and not timm.is_model(name):
        check_name(name.partition(".")[0], timm.list_models(), library="timm")
    settings = {**_image_size(name, input_shape), **options}
    try:
        network = timm.create_model(
            name, pretrained=pretrained, num_classes=output_size, in_chans=input_shape[0], **settings
        )
    except OSError as error:
        raise DataError(
            f"The weights or settings of network.name={name} could not be downloaded or read ({error}). Run once where "
            "there is a connection and copy the cache ($HF_HOME), give a file with "
            "+network.options.pretrained_cfg_overlay.file=PATH, or leave the weights random with "
            "network.pretrained=false."
        ) from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"network.name={name} cannot be built with network.pretrained={pretrained}, network.options="
            f"{dict(options)} and network.input_shape={list(input_shape)} ({error}). Change one of these."
        ) from error
    if getattr(getattr(network, "patch_embed", None), "num_patches", None) == 0:
        raise ConfigurationError(
            f"network.input_shape={list(input_shape)} is smaller than one patch of network.name={name}; use larger "
            "images (data.input_shape) or smaller patches, e.g. +network.options.patch_size=4."
        )
    return network


def _image_size(name: str, input_shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return ``img_size`` for models that take it: by timm's rule, those whose settings have a fixed input size."""
    import timm

    if ":" in name or not timm.is_model(name):
        return {}
    settings = timm.get_pretrained_cfg(name.partition(".")[0])
    if settings is None or not settings.fixed_input_size:
        return {}
    height, width = input_shape[1:]
    return {"img_size": (height, width)}
