"""Streams that announce no task: what is discovered, and that nothing else tells."""

import json
from itertools import pairwise

import lightning as L
import pytest
import torch

from supsup_lightning import (
    GG,
    NNS,
    AccuracyDiscovery,
    Binary,
    ContinualDataModule,
    Given,
    GradientDiscovery,
    LeNet,
    OneShot,
    PermutedDigits,
    PermutedMNIST,
    SupSup,
    Unannounced,
)
from supsup_lightning.callbacks import RecordStream, TaskBoundary, TaskDiscovery
from supsup_lightning.data import Digits, Rotated, Split
from supsup_lightning.discovery import Decision, Discovery, Recurring, Switching, Verdict
from supsup_lightning.errors import ConfigurationError, DiscoveryStopped
from supsup_lightning.report.metrics import TaskAssignment
from supsup_lightning.schedules import constant, cosine
from tests.conftest import QUIET, digits_lenet, fit, random_images, random_method, run_cli, run_cli_here, run_here
from tests.test_command_line import results


def digits_stream(num_tasks=3, *, steps=150, order=None, **options) -> Unannounced:
    return Unannounced(PermutedDigits(num_tasks=num_tasks, steps_per_task=steps), order, **options)


def learn(data, folder, **options):
    """Module, what was discovered and what was recorded, after training and test."""
    options = {"scenario": NNS, "inference": OneShot(images=8), **options}
    module, trainer = fit(digits_lenet(), data, folder=folder, **options)
    trainer.test(module, data, verbose=False)
    (discovery,) = (callback for callback in trainer.callbacks if isinstance(callback, TaskDiscovery))
    (record,) = (callback for callback in trainer.callbacks if isinstance(callback, RecordStream))
    return module, discovery, record


def actions(discovery) -> list[str]:
    return [decision.action for decision in discovery.decisions]


def test_each_task_gets_a_mask_of_its_own_and_is_learned_as_if_it_were_announced(tmp_path):
    data = digits_stream(4, steps=300)
    module, discovery, record = learn(data, tmp_path)
    assert module.method.tasks.tolist() == [0, 1, 2, 3]
    assert actions(discovery).count("new mask") == 4
    assert record.assignment().compute()["adjusted_rand_index"] > 0.97
    accuracy, found = module.test_accuracy.compute()
    assert found.mean() > 0.97

    announced, trainer = fit(digits_lenet(), data.tasks, folder=tmp_path, scenario=GG, inference=Given())
    trainer.test(announced, data.tasks, verbose=False)
    assert accuracy.mean() > announced.test_accuracy.compute()[0].mean() - 0.03


def test_masks_do_not_depend_on_epochs_so_the_loop_holds_no_hint(tmp_path):
    banks = []
    for steps_per_epoch in (1000, 130, 37):
        module, _ = fit(
            digits_lenet(), digits_stream(2, steps=130, steps_per_epoch=steps_per_epoch), folder=tmp_path, scenario=NNS
        )
        banks.append(module.method.bank.packed)
    assert len(banks[0]) == 2
    assert torch.equal(banks[0], banks[1])
    assert torch.equal(banks[0], banks[2])


def test_true_tasks_are_for_reports_alone(tmp_path, monkeypatch):
    """Whatever the data say of true tasks, and whether anybody asks, the masks are the same."""
    told, _ = fit(digits_lenet(), digits_stream(2), folder=tmp_path, scenario=NNS)
    monkeypatch.setattr(Unannounced, "true_task", lambda self, step: 0)
    monkeypatch.setattr(Unannounced, "true_tasks", lambda self, epoch: {0: 1.0})
    monkeypatch.setattr(Unannounced, "tasks_seen", lambda self, step: [])
    misled, _ = fit(digits_lenet(), digits_stream(2), folder=tmp_path, scenario=NNS)
    assert len(told.method.bank) == 2
    assert torch.equal(told.method.bank.packed, misled.method.bank.packed)


@pytest.mark.parametrize("scores", ["host", "device", "bits"])
def test_a_task_that_comes_again_trains_its_mask_on(tmp_path, scores):
    data = digits_stream(3, steps=300, order=Recurring(rounds=3))
    module, discovery, record = learn(data, tmp_path, discovery=AccuracyDiscovery(scores=scores))
    assert len(module.method.bank) == 3
    assert actions(discovery).count("switch") == 6
    assert record.assignment().compute()["matched"] > 0.95
    assert all(250 < steps < 350 for steps in discovery.learner.steps.values())
    assert module.test_accuracy.compute()[0].mean() > 0.93


def test_random_switching_is_noticed_at_once(tmp_path):
    data = digits_stream(3, steps=400, order=Switching(mean_steps=40))
    module, discovery, record = learn(data, tmp_path)
    assert len(module.method.bank) == 3
    assert record.assignment().compute()["matched"] > 0.9
    assert module.test_accuracy.compute()[0].mean() > 0.9
    late = [decision.step for decision in discovery.decisions if decision.action == "switch"]
    starts = {stretch.first for stretch in record.stretches}
    assert set(late) <= starts  # a switch begins a stretch
    assert any(step % 100 for step in late)


@pytest.mark.slow
def test_the_papers_rule_finds_tasks_without_looking_at_labels(tmp_path, mnist_root, monkeypatch):
    judge = GradientDiscovery.judge

    def blind(self, method, images, labels, **known):
        return judge(self, method, images, torch.full_like(labels, 10**6), **known)

    monkeypatch.setattr(GradientDiscovery, "judge", blind)
    _, trainer = fit(
        SupSup(LeNet(output_size=500)),
        Unannounced(PermutedMNIST(root=mnist_root, num_tasks=3, steps_per_task=300)),
        folder=tmp_path,
        scenario=NNS,
        discovery=GradientDiscovery(alarm=None),
        optimizer=lambda scores: torch.optim.RMSprop(scores, lr=1e-4),
        schedule=constant,
    )
    assert actions(trainer.callbacks[0]) == ["new mask", "go on", "go on"] * 3
    assert trainer.callbacks[1].assignment().compute()["adjusted_rand_index"] == 1


def test_the_papers_statistic_counts_random_masks_until_there_are_enough():
    method, images = random_method(1), random_images(16)
    verdict = GradientDiscovery(min_masks=5).judge(
        method, images, torch.zeros(16), num_classes=10, current=0, accuracy={}
    )
    assert verdict.task == 0
    assert 0 < verdict.statistic < 5
    assert verdict.threshold == 1.125
    assert len(method.bank) == 1


def test_what_a_mask_learned_of_another_task_meanwhile_is_dropped(tmp_path):
    """Without the alarm, a change between two decisions trains the wrong mask for a while."""
    data = Unannounced(PermutedDigits(num_tasks=2, steps_per_task=330))
    module, discovery, _ = learn(data, tmp_path, discovery=AccuracyDiscovery(alarm=None, every=110 + 40))
    # Decisions at 150, 300 (task 0) and 450 (task 1, after 120 batches of it).
    assert [(decision.step, decision.action) for decision in discovery.decisions[:4]] == [
        (0, "new mask"),
        (150, "go on"),
        (300, "go on"),
        (450, "new mask"),
    ]
    accuracy, _ = module.test_accuracy.compute()
    assert accuracy[0] > 0.93  # as at step 300


@pytest.mark.parametrize("at_max_masks", ["reuse", "stop"])
def test_at_the_most_masks_the_best_is_reused_or_training_stops(tmp_path, at_max_masks):
    discovery = AccuracyDiscovery(max_masks=2, at_max_masks=at_max_masks)
    if at_max_masks == "stop":
        with pytest.raises(DiscoveryStopped, match="step 300 of the stream, and there are discovery.max_masks=2"):
            learn(digits_stream(3), tmp_path, discovery=discovery)
        return
    module, found, _ = learn(digits_stream(3), tmp_path, discovery=discovery)
    assert len(module.method.bank) == 2
    assert "reuse" in actions(found)


def test_a_rule_of_ones_own(tmp_path):
    class ByMeanImage(Discovery):
        """Knows the two permutations by their mean images."""

        def judge(self, method, images, labels, *, num_classes, current, accuracy):
            assert images.dtype == torch.float32
            assert not method.training
            nearest = int((means - images.mean(0)).flatten(1).norm(dim=1).argmin())
            return Verdict(min(nearest, len(method.tasks) - 1), float(nearest < len(method.tasks)), 0.5)

    data = digits_stream(2)
    data.setup()
    means = torch.stack([next(iter(data.tasks.train_loader(task)))[0].mean(0) for task in (0, 1)])
    module, discovery, _ = learn(data, tmp_path, discovery=ByMeanImage(alarm=None, every=50))
    assert actions(discovery) == ["new mask", "go on", "go on", "new mask", "go on", "go on"]
    assert len(module.method.bank) == 2


# Combinations.


def turned(folder, angles, *, steps=300, **discovery):
    """Digits turned by these angles one after another."""

    class Angles(Rotated):
        def transformed(self, images, task, seed):
            return super().transformed(images, angles[task], seed)

    tasks = ContinualDataModule(Angles(Digits(), degrees=1), num_tasks=len(angles), steps_per_task=steps)
    return learn(
        Unannounced(tasks),
        folder,
        discovery=AccuracyDiscovery(threshold=0.95, **discovery),
        inference=Binary("entropy"),
    )


@pytest.mark.slow
def test_auto_combines_where_that_is_accurate_and_makes_a_mask_where_not(tmp_path):
    module, discovery, _ = turned(tmp_path, [0, 30, 15, 180], on_unknown="auto", tolerance=0.2)
    assert actions(discovery).count("combined") == 1
    combined = module.method.combinations.tasks.tolist()
    assert [module.true_tasks[task] for task in combined] == [2]
    assert module.method.num_masks == 3
    assert actions(discovery).count("combine") == 2  # the half turn was tried as well
    assert module.method.combination_bytes() == 3 * 4


def test_combine_always_does_and_costs_a_number_a_mask(tmp_path):
    module, discovery, _ = learn(
        digits_stream(4), tmp_path, discovery=AccuracyDiscovery(on_unknown="combine", trial_steps=60)
    )
    assert module.method.num_masks == 2
    assert len(module.method.combinations) >= 1
    assert actions(discovery).count("new mask") == 2


def test_a_trial_ends_with_the_stream_or_its_task_and_leaves_nothing_worthless(tmp_path):
    """Tasks of 60 batches are over before a trial of 100 is; nothing that was not accurate is kept."""
    rule = AccuracyDiscovery(on_unknown="auto", trial_steps=100)
    data = digits_stream(3, steps=160, order=Recurring(rounds=2))  # blocks of 80
    module, discovery, _ = learn(data, tmp_path, discovery=rule)
    assert not len(module.method.combinations)
    assert len(module.method.bank) == 3
    for decision, after in pairwise(discovery.decisions):
        if decision.action == "combine":
            assert after.step - decision.step == 50  # half of the trial shows that it is hopeless
    module, _, _ = learn(digits_stream(3, steps=150), tmp_path, discovery=AccuracyDiscovery(on_unknown="auto"))
    accuracy, found = module.test_accuracy.compute()
    assert accuracy[:2].min() > 0.8
    assert found[:2].min() > 0.9


@pytest.mark.parametrize("batch_size", [4, 16])
def test_small_batches_are_judged_together(tmp_path, batch_size):
    tasks = PermutedDigits(num_tasks=2, steps_per_task=600, batch_size=batch_size)
    module, _, record = learn(Unannounced(tasks), tmp_path)
    assert len(module.method.bank) == 2
    assert record.assignment().compute()["matched"] > 0.9


def test_deciding_at_every_batch_loses_nothing(tmp_path):
    module, discovery, _ = learn(digits_stream(2), tmp_path, discovery=AccuracyDiscovery(every=1))
    assert len(module.method.bank) == 2
    assert set(actions(discovery)) == {"new mask", "go on"}
    assert module.test_accuracy.compute()[0].min() > 0.93


def test_split_tasks_are_not_taken_for_one_another(tmp_path):
    tasks = ContinualDataModule(Split(Digits(), classes_per_task=2), steps_per_task=200)
    module, _, record = learn(Unannounced(tasks), tmp_path)
    assert len(module.method.bank) == 5
    assert record.assignment().compute()["matched"] > 0.9


def test_normalisation_statistics_come_again_with_their_task(tmp_path):
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 80), torch.nn.BatchNorm1d(80), torch.nn.ReLU(), torch.nn.Linear(80, 40)
    )
    module, trainer = fit(
        SupSup(network),
        digits_stream(2, steps=300, order=Recurring(rounds=2)),
        folder=tmp_path,
        scenario=NNS,
        inference=OneShot("entropy", images="batch"),
    )
    trainer.test(module, trainer.datamodule, verbose=False)
    assert len(module.method.bank) == 2
    assert not torch.equal(*module.method.bank.statistics)
    assert module.test_accuracy.compute()[0].min() > 0.85


# Several processes, and resuming.


@pytest.mark.slow
def test_two_processes_decide_as_one(tmp_path):
    options = ["scenario=nns", "data.num_tasks=3", "data.steps_per_task=120", "order=recurring", *QUIET]
    banks = []
    for name, trainer in (("one", "cpu"), ("two", "ddp_cpu")):
        run = run_cli_here if trainer == "cpu" else run_cli
        run(*options, f"trainer={trainer}", f"hydra.run.dir={name}", cwd=tmp_path)
        result = json.loads((tmp_path / name / "results.json").read_text())
        assert result["num_masks"] == 3
        assert result["assignment_accuracy"] > 0.95
        method = digits_lenet()
        method.load(tmp_path / name / "mask_bank.safetensors")
        banks.append(method.bank)
    same = (banks[0].packed == banks[1].packed).float().mean()
    assert same > 0.97  # up to rounding


class Stop(L.Callback):
    def __init__(self, folder, epoch):
        self.path, self.epoch = folder / "stopped.ckpt", epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize(("epoch", "on_unknown"), [(0, "auto"), (2, "new_mask"), (5, "auto"), (7, "new_mask")])
def test_a_resume_within_the_stream_ends_with_the_same_bits(tmp_path, epoch, on_unknown):
    def run(**options):
        data = digits_stream(3, steps=110, order=Recurring(rounds=2), steps_per_epoch=45)
        rule = AccuracyDiscovery(on_unknown=on_unknown, trial_steps=30)
        return fit(digits_lenet(), data, folder=tmp_path, scenario=NNS, discovery=rule, **options)

    whole, trainer = run()
    stop = Stop(tmp_path, epoch)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(callbacks=[stop])
    resumed, other = run(checkpoint=stop.path)
    for each in (trainer, other):
        each.test(datamodule=each.datamodule, model=each.lightning_module, verbose=False)
    assert torch.equal(whole.test_accuracy.compute(), resumed.test_accuracy.compute())
    for name, value in whole.method.bank.state_dict().items():
        assert torch.equal(value, resumed.method.bank.state_dict()[name])
    assert torch.equal(whole.method.combinations.coefficients, resumed.method.combinations.coefficients)
    assert str(trainer.callbacks[0].decisions) == str(other.callbacks[0].decisions)  # NaN is not itself
    assert trainer.callbacks[1].stretches == other.callbacks[1].stretches
    assert whole.true_tasks == resumed.true_tasks


def test_a_checkpoint_from_within_an_epoch_is_refused(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    data = digits_stream(2, steps=60, steps_per_epoch=40)
    fit(digits_lenet(), data, folder=tmp_path, scenario=NNS, callbacks=[Save()])
    with pytest.raises(ConfigurationError, match="written within an epoch"):
        fit(digits_lenet(), data, folder=tmp_path, scenario=NNS, checkpoint=tmp_path / "within.ckpt")


def test_a_run_writes_what_was_discovered_and_draws_it(tmp_path):
    options = ["scenario=nns", "data.num_tasks=2", "data.steps_per_task=120", "logger=csv", "eval_at=all"]
    done = run_cli_here(*options, "hydra.run.dir=run", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["learned_as"] == {"0": [0], "1": [1]}
    assert result["adjusted_rand_index"] > 0.9
    assert result["num_combinations"] == 0
    assert result["task_inference_accuracy"] > 0.5
    assert len(result["seconds_per_task"]) == 2
    assert (tmp_path / "run" / "figures" / "stream.png").read_bytes()[1:4] == b"PNG"
    rows = (tmp_path / "run" / "accuracy_matrix.csv").read_text().splitlines()
    assert rows[1].split(",")[1] != ""
    assert "discovery/statistic" in (tmp_path / "run" / "csv" / "version_0" / "metrics.csv").read_text()
    assert "batch 120: task 1, new mask" in done.stdout or "batch 121: task 1, new mask" in done.stdout
    assert "learned as" in done.stdout


# Mistakes.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["order=recurring"], "order is an option of scenario=nns; add that, or leave order out"),
        (["discovery=gradient"], "discovery is an option of scenario=nns; add that"),
        (["scenario=nns", "schedule=cosine"], "schedule=cosine has to know how long a task lasts"),
        (["scenario=nns", "callbacks=default"], "others need scenario=nns, with TaskDiscovery"),
        (["scenario=nns", "inference=given"], "In scenario=nns the task is hidden at inference"),
        (["scenario=nns", "discovery.every=0"], "discovery.every=0 must be an integer"),
        (["scenario=nns", "discovery.on_unknown=new"], "discovery.on_unknown='new' is not known"),
        (["scenario=nns", "discovery.scores=disk"], "discovery.scores='disk' is not known; choose one of device"),
        (["scenario=nns", "discovery.evry=10"], "Did you mean discovery.every"),
        (["discovery.every=10"], "discovery is an option of scenario=nns"),
        (["scenario=nns", "order.mean_steps=30"], "order=switching has it"),
        (["scenario=nns", "discovery.epsilon=0.1"], "discovery=gradient has it"),
        (["callbacks=discovery"], "callbacks=discovery is for scenario=nns alone"),
        (["scenario=nns", "discovery.threshold=abc"], "discovery.threshold='abc' must lie between"),
        (["scenario=nns", "order.tasks=3"], "order.tasks=3 must be a list of tasks"),
        (
            [
                "scenario=nns",
                "discovery.objective=superfluous",
                "inference.objective=entropy",
                "network.output_size=10",
            ],
            "discovery.objective=superfluous needs outputs beyond the classes",
        ),
        (["scenario=nns", "+trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches=2 would mix"),
    ],
)
def test_mistakes_are_answered_before_training(overrides, message, tmp_path, monkeypatch, capsys):

    with pytest.raises(SystemExit):
        run_here(monkeypatch, tmp_path, *overrides, "data.num_tasks=2", *QUIET)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AccuracyDiscovery(threshold=1.5), "discovery.threshold=1.5 must lie between"),
        (lambda: AccuracyDiscovery(candidates=0), "discovery.candidates=0 must be an integer"),
        (lambda: AccuracyDiscovery(tolerance=2), "discovery.tolerance=2 is in accuracy"),
        (lambda: AccuracyDiscovery(alarm=0), "discovery.alarm=0 is a share"),
        (lambda: AccuracyDiscovery(max_masks=0), "discovery.max_masks=0 must be an integer"),
        (lambda: AccuracyDiscovery(at_max_masks="stop"), "stop has no effect without discovery.max_masks"),
        (lambda: AccuracyDiscovery(on_unknown="auto", combine_from=3, max_masks=2), "combine_from=3 masks cannot be"),
        (lambda: GradientDiscovery(epsilon=0), "discovery.epsilon=0 must be positive"),
        (lambda: GradientDiscovery(min_masks=1), "one mask by itself always wins"),
    ],
)
def test_bad_options_of_discoveries_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_announced_tasks_and_hidden_ones_are_not_mixed_up(tmp_path):
    with pytest.raises(ConfigurationError, match=r"wrap the others: Unannounced\(data\)"):
        fit(digits_lenet(), digits_stream().tasks, folder=tmp_path, scenario=NNS)
    with pytest.raises(ConfigurationError, match="others need scenario=nns"):
        fit(digits_lenet(), digits_stream(), folder=tmp_path)
    with pytest.raises(ConfigurationError, match="schedule=cosine has to know"):
        fit(digits_lenet(), digits_stream(), folder=tmp_path, scenario=NNS, schedule=cosine)
    with pytest.raises(ConfigurationError, match="others need scenario=nns, with TaskDiscovery"):
        fit(digits_lenet(), digits_stream(), folder=tmp_path, scenario=NNS, callbacks=[TaskBoundary()])


def test_the_assignment_does_not_depend_on_numbers_and_counts_batches():
    one, other, split = TaskAssignment(), TaskAssignment(), TaskAssignment()
    for task in range(4):
        one.update(task, task, batches=10)
        other.update((task + 1) % 4 + 7, task, batches=10)
        split.update(task, task, batches=5)
        split.update(10 + task, task, batches=5)
    assert one.compute() == other.compute() == {"adjusted_rand_index": 1, "matched": 1}
    assert split.compute()["matched"] == 0.5
    assert 0 < split.compute()["adjusted_rand_index"] < 1


def test_scores_do_not_depend_on_the_record_of_the_stream(tmp_path, monkeypatch):
    options = ["scenario=nns", "data.num_tasks=2", "data.steps_per_task=150", "datamodule.steps_per_epoch=100", *QUIET]
    for name, more in (("with", []), ("without", ["~callbacks.stream_record"])):
        run_here(monkeypatch, tmp_path, *options, *more, f"hydra.run.dir={name}")
    one, other = (results(tmp_path / name) for name in ("with", "without"))
    assert one["task_inference_accuracy"] == other["task_inference_accuracy"] > 0.9
    assert one["accuracy_per_task"] == other["accuracy_per_task"]
    (tmp_path / "without" / "results.json").unlink()  # a run whose test is left to do
    run_here(monkeypatch, tmp_path, *options, "~callbacks.stream_record", "hydra.run.dir=without", "resume=true")
    assert results(tmp_path / "without")["task_inference_accuracy"] == one["task_inference_accuracy"]


def test_what_each_task_has_learned_follows_from_the_decisions():
    stream = digits_stream(3, steps=100)
    decisions = [Decision(0, "new mask", 0), Decision(120, "new mask", 1), Decision(210, "new mask", 2)]
    assert stream.learned(decisions, before=300) == {0: {0: 100, 1: 20}, 1: {1: 80, 2: 10}, 2: {2: 90}}
    assert stream.learned(decisions, before=130) == {0: {0: 100, 1: 20}, 1: {1: 10}}
