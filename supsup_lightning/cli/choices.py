"""Defaults of configuration groups, which may depend on the choices of other groups."""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig

_GIVEN = {"scenario": "gg", "inference": "given"}

# Group, its choice, and the defaults that it sets in other groups. If two set different ones, the upper one is used.
_BROUGHT: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "method": {
        "hopfield": {"network": "hop_net", "mask": "gains", "inference": "hopfield", "scenario": "gns"},
        **dict.fromkeys(("batch_ensemble", "psp", "separate_heads"), _GIVEN),
        **dict.fromkeys(("lower_bound", "small_networks", "upper_bound"), _GIVEN),
    },
    "scenario": {
        "gg": {"inference": "given"},
        "nns": {"schedule": "inverse_sqrt", "callbacks": "discovery", "inference": "one_shot"},
    },
    "optimizer": {
        "rmsprop": {"schedule": "constant"},
    },
}


def default(group: str, otherwise: str, *, _root_: DictConfig) -> str:
    """Return the default choice of a group. Resolver ``default`` of train.yaml; the order of its lines is free.

    Args:
        group: the group without a choice.
        otherwise: the choice, if no other group sets one.
        _root_: the choices by group, passed by `omegaconf`.
    """
    return next((choice for _, choice in _bringers(group, _root_)), otherwise)


def given_way(group: str, choices: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return pairs of a choice, such as ``optimizer=rmsprop``, and its default for ``group`` that is not used."""
    return [(choice, brought) for choice, brought in _bringers(group, choices) if brought != choices[group]]


def _bringers(group: str, choices: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the choices that set a default for ``group``, with that default."""
    for other, brought in _BROUGHT.items():
        if other != group:
            chosen = choices.get(other) or next((choice for _, choice in _bringers(other, choices)), "")
            if group in brought.get(chosen, {}):
                yield f"{other}={chosen}", brought[chosen][group]


def listed() -> str:
    """Return the groups and their choices, one line per group. Resolver ``listed`` of the text of ``--help``.

    Groups called ``options`` are left out: their files are parts of others.
    """
    loader = GlobalHydra.instance().config_loader()
    groups = []
    waiting = [group for group in loader.list_groups("") if group != "hydra"]
    while waiting:
        group = waiting.pop()
        groups.append(group)
        waiting += [f"{group}/{name}" for name in loader.list_groups(group) if name != "options"]
    lines = [f"{group}: {', '.join(loader.get_group_options(group, ObjectType.CONFIG))}" for group in sorted(groups)]
    return "\n".join(lines).replace("$", "$$")  # Hydra takes the text as a `string.Template`
