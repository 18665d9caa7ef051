import json

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supsup_lightning import GG, ContinualModule, Given, PermutedDigits, Unannounced
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.masks import MaskOptions
from supsup_lightning.methods.sparsity_search import SparsitySearch
from supsup_lightning.scenario import NNS
from tests.conftest import QUIET, StopAfter, digits_lenet, fit, random_method, run_cli_here


@given(accuracies=st.lists(st.integers(0, 100), min_size=8, max_size=8), tolerance=st.integers(0, 30))
def test_it_finds_the_sparsest_where_accuracy_falls_with_sparsity(accuracies, tolerance):
    by_sparsity = dict(zip(MaskOptions().search_candidates, sorted(accuracies, reverse=True), strict=True))
    search = SparsitySearch(MaskOptions().search_candidates, tolerance=tolerance / 100, num_weights=1)
    tried = []
    for _ in range(search.num_trials):
        tried.append(search.begin(0))
        search.judge(0, by_sparsity[tried[-1]] / 100, torch.tensor([tried[-1]]), torch.zeros(0))
    right = max(
        s
        for s, accuracy in by_sparsity.items()
        if accuracy >= by_sparsity[MaskOptions().search_candidates[0]] - tolerance
    )
    assert search.chosen(0) == right
    assert search.scores.item() == pytest.approx(right)  # the scores are those of the mask that is kept
    assert len(set(tried)) == len(tried) == 4


def test_exactly_the_tolerance_below_is_accurate_enough():
    search = SparsitySearch((0.5, 0.9), tolerance=0.01, num_weights=1)
    for accuracy in (0.97, 0.96):
        search.begin(0)
        search.judge(0, torch.tensor(accuracy).item(), torch.zeros(1), torch.zeros(0))
    assert search.chosen(0) == 0.9


def searching(**options):
    return digits_lenet(
        rule="topk", sparsity="auto", search_candidates=(0.5, 0.8, 0.95, 0.99), search_tolerance=0.05, **options
    )


class Tried(L.Callback):
    """What is reported, and the share of the weights in the mask at the end of each training."""

    def __init__(self):
        self.off = []

    def on_train_epoch_start(self, trainer, pl_module):
        method = pl_module.method
        self.off.append(1 - method.rule(method.live.values).mean().item())


def test_each_task_is_trained_at_several_sparsities_and_keeps_one(tmp_path):
    data = PermutedDigits(num_tasks=2, steps_per_task=60)
    watch = Tried()
    method = searching()
    module, _trainer = fit(method, data, folder=tmp_path, scenario=GG, inference=Given(), callbacks=[watch])
    assert data.num_epochs == 6
    report = method.details()["sparsity_search"]
    assert report["trainings_per_task"] == 3
    for task in ("0", "1"):
        tried = dict(report["tried"][task])
        chosen = report["chosen"][task]
        assert next(iter(tried)) == 0.5
        assert tried[chosen] >= tried[0.5] - 0.05
        assert all(accuracy < tried[0.5] - 0.05 for sparsity, accuracy in tried.items() if sparsity > chosen)
        assert method.sparsity()[int(task)].item() == pytest.approx(chosen, abs=2e-3)
    tried = [sparsity for pairs in report["tried"].values() for sparsity, _ in pairs]
    assert watch.off == pytest.approx(tried, abs=2e-3)
    # The mask that is kept is as accurate as it was when it was tried.
    with torch.no_grad():
        images, labels = next(iter(data.val_loader(1)))
        module.eval()
        right = (module.classes(method(images, 1), 1) == labels).float().mean().item()
    assert right == pytest.approx(dict(report["tried"]["1"])[report["chosen"]["1"]], abs=1e-6)


def test_a_search_resumes_between_its_trainings_to_the_same_masks(tmp_path):
    def run(folder, *, stop_after=None, checkpoint=None):
        data = PermutedDigits(num_tasks=2, epochs_per_task=2)
        callbacks = [] if stop_after is None else [StopAfter(stop_after, tmp_path / "stopped.ckpt")]
        method = searching()
        fit(method, data, folder=folder, scenario=GG, inference=Given(), callbacks=callbacks, checkpoint=checkpoint)
        return method

    whole = run(tmp_path)
    for epoch in (1, 2, 8):  # between trainings, within one, and within one of the second task
        run(tmp_path, stop_after=epoch)
        resumed = run(tmp_path, checkpoint=tmp_path / "stopped.ckpt")
        assert torch.equal(resumed.bank.packed, whole.bank.packed)
        assert resumed.details() == whole.details()


def test_the_command_line_says_what_it_costs_and_what_was_chosen(tmp_path):
    options = ["mask.rule=topk", "mask.sparsity=auto", "mask.search.candidates=[0.5,0.9]", "data.num_tasks=2"]
    done = run_cli_here(*options, "data.steps_per_task=30", *QUIET, "hydra.run.dir=out", cwd=tmp_path)
    assert "mask.sparsity=auto trained each task 2 times" in " ".join(done.stdout.split())
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(result["sparsity_search"]["chosen"]) == {"0", "1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "auto"}, "mask.sparsity=auto with mask.rule=threshold"),
        ({"sparsity": "aut", "rule": "topk"}, "mask.sparsity=aut with mask.rule=topk: give a share in .* or auto"),
        ({"sparsity": "auto", "rule": "topk", "search_candidates": (0.5, 0.7, 0.9)}, "must be 2, 4, 8 or 16"),
        ({"sparsity": "auto", "rule": "topk", "search_candidates": (0.9, 0.5)}, "from the densest on"),
        ({"sparsity": "auto", "rule": "topk", "search_candidates": (0.5, 1.0)}, r"it lies in \[0, 1\)"),
        ({"sparsity": "auto", "rule": "topk", "search_candidates": (0.5, 0.99999)}, "leaves no weight"),
        ({"sparsity": "auto", "rule": "topk", "search_candidates": 0.5}, "mask.search.candidates=0.5 must be"),
        ({"sparsity": "auto", "rule": "topk", "search_candidates": [i / 32 for i in range(32)]}, "2, 4, 8 or 16"),
        ({"sparsity": "auto", "rule": "topk", "search_tolerance": 2}, "mask.search.tolerance=2"),
        ({"sparsity": "auto", "rule": "topk", "search_tolerance": "abc"}, "mask.search.tolerance='abc'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, message):
    with pytest.raises(ConfigurationError, match=message):
        random_method(0, **options)


def test_a_search_needs_validation_at_the_end_of_each_training(tmp_path):
    data = PermutedDigits(num_tasks=2, epochs_per_task=2)
    module = ContinualModule(searching(), scenario=GG, inference=Given())
    for options in ({"check_val_every_n_epoch": 3}, {"limit_val_batches": 0}):
        callbacks = module.task_callbacks(data)
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=callbacks,
            max_epochs=data.num_epochs,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **options,
        )
        with pytest.raises(ConfigurationError, match="goes by validation images at the end of each training"):
            trainer.fit(module, data)


def test_streams_that_announce_nothing_are_refused(tmp_path):
    data = Unannounced(PermutedDigits(num_tasks=2, steps_per_task=200))
    with pytest.raises(ConfigurationError, match="mask.sparsity=auto needs to be told where a task ends"):
        fit(searching(), data, folder=tmp_path, scenario=NNS)
