"""Check of a model's name in the collection of another library."""

from collections.abc import Collection
from difflib import get_close_matches

from supsup_lightning.errors import ConfigurationError


def check_name(name: str, names: Collection[str], *, library: str) -> None:
    """Raise `ConfigurationError` with the nearest names unless ``name`` is one of ``names``.

    >>> check_name("resnet81", ["resnet18", "resnet34", "vgg11"], library="torchvision")
    Traceback (most recent call last):
        ...
    supsup_lightning.errors.ConfigurationError: network.name='resnet81' is not a classification model of torchvision; \
did you mean resnet18 or resnet34? There are 3: see `list_models` of torchvision.
    """
    if name in names:
        return
    nearest = get_close_matches(name, names, n=3)
    suggestion = f"did you mean {' or '.join(nearest)}?" if nearest else "no name is near."
    raise ConfigurationError(
        f"network.name={name!r} is not a classification model of {library}; {suggestion} "
        f"There are {len(names)}: see `list_models` of {library}."
    )
