"""Configuration of an evaluation: that of the run, with other options for its test."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override

from supsup_lightning.cli import command_line, effects  # noqa: F401 (the first registers resolvers)
from supsup_lightning.cli.output_name import naming, run_name
from supsup_lightning.errors import ConfigurationError, MismatchError
from supsup_lightning.runs import run_identity
from supsup_lightning.runs.evaluation_rules import (
    EVALUATED,
    OF_READING,
    check_differences,
    check_typed,
    needs_training,
)
from supsup_lightning.runs.finished_run import FinishedRun
from supsup_lightning.runs.run_identity import Identity


@dataclass(frozen=True)
class EvaluationConfig:
    """Configuration of an evaluation.

    Attributes:
        config: resolved configuration.
        choices: the chosen files, by group.
        identity: its identity, other than that of the run if any option differs.
        other_data: what differs in the data, in words; empty if tasks are tested on the images of the run.
    """

    config: DictConfig
    choices: Mapping[str, str]
    identity: Identity
    other_data: Sequence[str]


def evaluation_name(run: FinishedRun, overrides: Sequence[str]) -> str:
    """Return the directory name of an evaluation; the same overrides, in any order, have the same name.

    Args:
        run: the finished run.
        overrides: overrides as on its command line, of the groups `inference`, `scenario`, `data` and `trainer`.

    Raises:
        ConfigurationError: an override that has no effect on a test.
        MismatchError: this version composes another configuration from the run's own overrides.
    """
    for override in _parsed(overrides):
        check_typed(override)
    try:
        with _composed(run, run.overrides, output=run.folder) as (config, choices):
            identity = run_identity.identity_of(config, choices=choices, folder=run.folder)
            different = identity.differences(run.record)
            name = run_name(naming(OmegaConf.create(list(overrides)), config.data))
    except HydraException as error:
        raise MismatchError(
            f"{run.folder} has options that this version does not know: {error}. {_other_version(run)}"
        ) from error
    if different:
        raise MismatchError(
            f"The overrides of {run.folder} make another configuration in this version: {'; '.join(different)}. "
            f"{_other_version(run)}"
        )
    return name


def compose_evaluation(run: FinishedRun, overrides: Sequence[str], *, output: Path) -> EvaluationConfig:
    """Compose the configuration of a run with overrides for its test, which `evaluation_name` has checked.

    Args:
        run: the finished run.
        overrides: as for `evaluation_name`.
        output: folder that results are written to.

    Raises:
        ConfigurationError: an override that needs another training, or does not fit the others.
    """
    typed = _parsed(overrides)
    for override in typed:
        group, chosen = override.key_or_group, run.record["choices"]
        if group in chosen and group not in EVALUATED and str(override.value()) != chosen[group]:
            raise ConfigurationError(needs_training(group, there=chosen[group], here=override.value()))
    anew = _groups_chosen_anew(run, typed)
    kept = [override for override in run.overrides if not _gives_way(override, anew)]
    with _composed(run, [*kept, *overrides], output=output) as (config, choices):
        if "inference" in anew:
            _choose_inference(config, run, typed, choices, output=output)
        effects.check_idle(config, overrides)
        identity = run_identity.identity_of(config, choices=choices, folder=output)
        other_data = check_differences(run, identity, {override.key_or_group for override in typed})
        _start_where_the_run_did(config, run, typed)
        if config.datamodule.get("order") is not None:  # only for training; it may name tasks that are not tested
            config.datamodule.order = {"_target_": "supsup_lightning.discovery.Blocks"}
        OmegaConf.resolve(config)
    return EvaluationConfig(config, choices, identity, other_data)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


@contextmanager
def _composed(
    run: FinishedRun, overrides: Sequence[str], *, output: Path
) -> Iterator[tuple[DictConfig, dict[str, str]]]:
    """Compose a configuration whose references to Hydra's own values hold within the block."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    GlobalHydra.instance().clear()
    path = ",".join(f"'{place}'" for place in run.search_path)
    with initialize_config_module("supsup_lightning.conf", version_base="1.3"):
        found = [f"hydra.searchpath=[{path}]"] if path else []
        config = compose("train", overrides=[*found, *overrides], return_hydra_config=True)
    try:
        with flag_override(config, ["struct", "readonly"], False):
            config.hydra.runtime.output_dir = str(output)
            hydra.set_config(config)
            choices = {str(group): str(name) for group, name in config.hydra.runtime.choices.items()}
            del config["hydra"]
            yield config, choices
    finally:
        hydra.cfg = before  # Lightning starts the processes of a test in another way where Hydra runs


def _groups_chosen_anew(run: FinishedRun, typed: Sequence[Override]) -> set[str]:
    """Groups whose options of the run give way to those of another choice."""
    anew = {override.key_or_group for override in typed if override.key_or_group in EVALUATED}
    scenario = run.record["choices"].get("scenario")
    chosen = next((override.value() for override in typed if override.key_or_group == "scenario"), scenario)
    if "nns" in (scenario, chosen) and scenario != chosen:
        raise ConfigurationError(
            f"scenario={chosen} does not go with a run of scenario={scenario}: scenario=nns alone has tasks with "
            "numbers of the learner's own. Use scenario=gg, gns or gnu for a run with announced tasks, and for "
            "another one train again."
        )
    if "gg" in (scenario, chosen) and scenario != chosen:
        anew.add("inference")  # what finds tasks has nothing to find where they are given, and the other way round
    return anew


def _gives_way(override: str, anew: set[str]) -> bool:
    """Whether an override of the run is for a choice that another one replaces."""
    key = re.split("=", override.lstrip("+~"), maxsplit=1)[0]
    group = re.split(r"[./@]", key)[0]
    if group == "data" and "data" in anew:  # the kind and number of tasks stay
        return key.startswith("data.stream.source") or key.removeprefix("data.") in OF_READING
    return group in anew and group in ("inference", "trainer")


def _choose_inference(
    config: DictConfig, run: FinishedRun, typed: Sequence[Override], choices: Mapping[str, str], *, output: Path
) -> None:
    """Put in the options of the chosen inference alone, without those that an experiment set for another one."""
    own = [override.input_line for override in typed if re.match(r"inference\b", override.key_or_group)]
    groups = [f"{group}={choices[group]}" for group in ("method", "scenario", "inference")]
    with _composed(run, [*groups, *map(str, own)], output=output) as (fresh, _):
        config.inference = OmegaConf.create(OmegaConf.to_container(fresh.inference))


def _start_where_the_run_did(config: DictConfig, run: FinishedRun, typed: Sequence[Override]) -> None:
    """Let a relative ``data.root`` of the run start from the folder that the run was started in."""
    root = config.data.get("root")
    given = any(override.key_or_group == "data.root" for override in typed)
    if root is not None and run.started_in is not None and not given and not Path(str(root)).expanduser().is_absolute():
        config.data.root = str(run.started_in / str(root))


def _other_version(run: FinishedRun) -> str:
    version = (run.results.get("versions") or {}).get("supsup-lightning", "another version")
    return f"Evaluate it with the version that made it ({version}) and the same configuration files."
