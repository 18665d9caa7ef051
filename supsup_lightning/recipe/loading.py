"""From a file of finished tasks to a model that predicts, on a machine that never saw the run."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from supsup_lightning import networks  # noqa: F401 (whose classes a file may name once they are imported)
from supsup_lightning.bank import codec
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError, SupSupError
from supsup_lightning.inference import Inference
from supsup_lightning.methods import Method, SmallNetworks
from supsup_lightning.module import ContinualModule
from supsup_lightning.recipe import building, contents, fingerprint
from supsup_lightning.recipe.recorded import KNOWN, LACKS, TARGET


def load(
    path: str | Path, *, network: nn.Module | None = None, inference: Inference | None = None, trust: bool = False
) -> ContinualModule:
    """Make the model of a file that `ContinualModule.save` has written; a run's ``mask_bank.safetensors`` is one.

    Nothing is unpickled. Networks of this package, and those of torchvision and timm with random weights, are made
    from their arguments, which are plain values; any other has to be handed over, or trusted.

    Args:
        path: path of the file.
        network: the network, made as for training; by default it is made as the file says.
        inference: how the task of images is found; by default as in training.
        trust: import a network's class from wherever the file says, and call it with the arguments there; download
            pretrained weights. A file from a stranger could so run any program.

    Returns:
        The model in evaluation mode, on the CPU; see `ContinualModule.predict`.

    Raises:
        DataError: the file is missing or damaged, or was written by an earlier version, which told less.
        ConfigurationError: the network has to be handed over, or to be trusted.
        MismatchError: a network that is not the one of the file.
    """
    recipe = codec.read_recipe(path)
    if recipe is None:
        raise DataError(
            f"The file {path} holds finished tasks alone, and does not say how to predict with them: a method's own "
            "`save`, or an earlier version, wrote it. Make the model as for training, then model.method.load(path) "
            "and model.num_classes = those of the data. model.save(path) then writes all of it."
        )
    written = recipe.get("version")
    if not isinstance(written, int) or written > contents.VERSION:
        raise MismatchError(
            f"The file {path} has a recipe of version {written!s:.20}, and this version of supsup_lightning reads "
            f"those up to {contents.VERSION}; use a newer one."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            module = _module(recipe, Path(path), network=network, inference=inference, trust=trust)
    except DataError as error:
        raise DataError(f"The file {path} is refused: {error}") from error
    except MismatchError as error:
        more = " The network that was handed over is not that of the file." if network is not None else ""
        raise MismatchError(f"The file {path} is refused: {error}{more}") from error
    except SupSupError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"The file {path} is refused: its recipe is damaged or made up ({type(error).__name__}: {error!s:.200})."
        ) from error
    return module.eval()


def _module(
    recipe: dict[str, Any], path: Path, *, network: nn.Module | None, inference: Inference | None, trust: bool
) -> ContinualModule:
    method = _method(recipe, network, path, trust=trust)
    inputs, about = contents.inputs_of(recipe), contents.about_data(recipe)
    scenario = building.own(recipe["scenario"])
    if inference is None:
        inference = _part(recipe, "inference", Inference, "Hand it over: load(path, inference=...).")
    module = ContinualModule(method, inference=inference, scenario=scenario)
    method.load(path)
    num_classes = tuple(recipe["num_classes"])
    finished = method.tasks.tolist()
    if not finished or not all(isinstance(number, int) and 0 < number < 2**31 for number in num_classes):
        raise DataError("it has no finished task, or does not say how many classes each has")
    if scenario.task_known_in_training and max(finished) >= len(num_classes):
        raise DataError(f"it does not say how many classes task {max(finished)} has")
    module.num_classes, module.inputs, module.about_data = num_classes, inputs, about
    gate = method.gate
    if gate is not None and gate.description is not None:
        number = gate.description.get("features")
        if number is not None and number != gate.sums.num_features:
            raise DataError(f"its features are {number}, and its sums are over {gate.sums.num_features}")
        if number is not None and inputs is not None and tuple(gate.description.get("shape", ())) != inputs.shape:
            raise DataError(f"its features are of other images than of shape {list(inputs.shape)}")
    module.accuracies = {
        str(name): {int(task): float(value) for task, value in values.items()}
        for name, values in recipe["accuracy"].items()
    }
    fingerprint.check(method, inputs, recipe["fingerprint"])
    return module


def _method(recipe: dict[str, Any], network: nn.Module | None, path: Path, *, trust: bool) -> Method:
    description = recipe["method"]
    kind = KNOWN.get(description[TARGET])
    if network is None:
        needs = getattr(kind, "_needs_base", True)
        keeps = description.get("weights") == "keep" and not description.get("store_weights")
        network = building.network(
            recipe["network"], trust=trust, file_bytes=path.stat().st_size, needs_weights=needs and keeps
        )
        if needs and keeps and not trust and not _is_pretrained(recipe["network"]):
            raise ConfigurationError(
                f"The file {path} has masks over weights that are neither in it nor drawn from a seed (weights=keep). "
                "Make the network with these weights and hand it over: load(path, network=...); or train with "
                "method.store_weights=true."
            )
    given: Any = network
    if kind is SmallNetworks:  # its width was chosen in training

        def given(*, width: float = 1.0) -> nn.Module:
            return network

    return _part(recipe, "method", Method, _MAKE_METHOD, network=given)


_MAKE_METHOD = "Make the model as for training, then model.method.load(path)."


def _is_pretrained(description: dict[str, Any]) -> bool:
    return bool(description.get("weights") or description.get("pretrained"))


def _part(recipe: dict[str, Any], name: str, kind: type, remedy: str, **given: Any) -> Any:
    description = recipe[name]
    if LACKS in description:
        raise ConfigurationError(
            f"The {name} ({str(description[TARGET])[:200]}) cannot be made from the file, which lacks "
            f"{str(description[LACKS])[:200]}. {remedy}"
        )
    made = building.own(description, **given)
    if not isinstance(made, kind):
        raise DataError(f"its {name} is a {type(made).__name__}")
    return made
