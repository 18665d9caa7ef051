"""All options of masks as one value: by keyword, as `MaskOptions`, and on the command line."""

import pytest
import torch
from torch import nn

from supsup_lightning import ByName, HopSupSup, MaskOptions, SupSup
from supsup_lightning.errors import ConfigurationError
from tests.conftest import QUIET, run_here
from tests.test_command_line import results


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 12))


def test_keywords_and_one_value_make_the_same_masks():
    options = {"rule": "topk", "sparsity": 0.7, "is_masked": ByName(exclude=("3.*",))}
    one, other = SupSup(network(), **options), SupSup(network(), mask=MaskOptions(**options))
    for method in (one, other):
        method.begin_task(0)
        method.finish_task(0)
    assert one.layout.names == ("1.weight",)
    assert torch.equal(one.bank.packed, other.bank.packed)
    assert one.bank.sparsity().item() == pytest.approx(0.7, abs=1e-2)
    assert one.identity | {"network": ""} == other.identity | {"network": ""}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SupSup(network(), sparsty=0.5), "'sparsty'; did you mean 'sparsity'"),
        (lambda: SupSup(network(), mask=MaskOptions(), rule="topk"), "Give rule within mask"),
        (lambda: SupSup(network(), search_tolerance=0.5), "mask.search.tolerance=0.5 has no effect"),
        (lambda: SupSup(network(), search_candidates=(0.1, 0.2)), "mask.search.candidates=.* has no effect"),
        (lambda: HopSupSup(network(), init="transfer"), "mask.init=transfer has no effect with HopSupSup"),
        (lambda: HopSupSup(network(), rule="topk", sparsity="auto"), "auto is for method=supsup alone"),
        (lambda: SupSup(network(), rule="largest"), "mask.rule='largest' is not known"),
        (lambda: SupSup(network(), sparsity="none", rule="topk"), "mask.sparsity=none with mask.rule=topk"),
    ],
)
def test_what_would_change_nothing_or_is_mistyped_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_group_reaches_the_method_as_one_value(tmp_path, monkeypatch):
    run_here(
        monkeypatch,
        tmp_path,
        *["mask.rule=topk", "mask.sparsity=0.8", "mask.exclude=[5.*]", "scenario=gg", "data.num_tasks=1"],
        *["data.steps_per_task=2", "eval_at=[]", "hydra.run.dir=run", *QUIET],
    )
    assert results(tmp_path / "run")["sparsity"] == pytest.approx(0.8, abs=1e-3)
