"""References between options of a configuration."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError


def is_read(config: DictConfig, path: str) -> bool:
    """Whether another option refers to the one at ``path``, that is, changes or cannot be resolved without it.

    >>> is_read(OmegaConf.create({"size": {"width": 3}, "layers": ["${size.width}"]}), "size.width")
    True
    """
    without = config.copy()
    with open_dict(without):
        _remove(without, path)
    others = OmegaConf.to_container(config, resolve=True)
    _remove(others, path)
    try:
        return OmegaConf.to_container(without, resolve=True) != others
    except InterpolationKeyError:
        return True


def _remove(config: Any, path: str) -> None:
    *groups, name = path.split(".")
    for group in groups:
        config = config[group]
    del config[name]
