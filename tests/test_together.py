"""Several tasks trained in the same step: the same masks as one by one."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch import nn

from supsup_lightning import (
    PSP,
    ContinualDataModule,
    ContinualModule,
    GEMResNet18,
    Given,
    LeNet,
    OneShot,
    PermutedDigits,
    SupSup,
    Unannounced,
)
from supsup_lightning.data import Digits, Split
from supsup_lightning.data.tasks import SideBySide
from supsup_lightning.errors import ConfigurationError, DataError, MismatchError
from supsup_lightning.module import default_optimizer
from supsup_lightning.planning import fitting, is_elementwise, training_bytes
from supsup_lightning.report.summary import read_json
from supsup_lightning.scenario import GG
from tests.conftest import DIGITS, StopAfter, digits_lenet, fit, run_cli, run_cli_here

GIVEN = ["scenario=gg", "logger=none", "~callbacks.figures"]


def permuted(*, at_once, num_tasks=5, steps=40, **options):
    return PermutedDigits(num_tasks=num_tasks, steps_per_task=steps, tasks_at_once=at_once, **options)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 20, bias=False),
    )


NETWORKS = {
    "lenet": lambda: LeNet(output_size=20, input_shape=DIGITS),
    "convolutions": convolutions,
    "resnet": lambda: GEMResNet18(output_size=20, input_shape=DIGITS, base_channels=4),
}


def differing(one, other) -> float:
    """Share of bits of two banks with the same tasks in the same order."""
    assert torch.equal(one.tasks, other.tasks)
    bits = torch.stack([one.get(task) for task in one.tasks.tolist()])
    others = torch.stack([other.get(task) for task in other.tasks.tolist()])
    return (bits != others).float().mean().item()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"rule": "topk", "sparsity": 0.7}], ids=["threshold", "topk"])
def test_tasks_at_once_learn_the_masks_that_they_learn_one_by_one(network, options, tmp_path):
    banks = {}
    for at_once in (1, 2, 5):
        torch.manual_seed(0)
        method = SupSup(NETWORKS[network](), **options)
        data = permuted(at_once=at_once, steps=12)
        module, _ = fit(method, data, folder=tmp_path, inference=OneShot(images="batch"))
        banks[at_once] = module.method.bank
        assert not module.method.live.tasks
        assert not method.live.tasks
    fresh = SupSup(NETWORKS[network](), **options)
    for task in range(5):
        fresh.begin_task(task)
        fresh.finish_task(task)
    assert differing(banks[1], fresh.bank) > 0.003  # training changes masks
    for at_once in (2, 5):  # the last group of two has one task
        assert differing(banks[1], banks[at_once]) < 2e-4
        torch.testing.assert_close(banks[at_once].statistics, banks[1].statistics, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("network", ["lenet", "convolutions"])
@pytest.mark.parametrize("options", [{}, {"rule": "topk", "sparsity": 0.7}], ids=["threshold", "topk"])
def test_logits_gradients_and_statistics_of_each_task_are_those_that_it_has_by_itself(network, options):
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(3, 16, *DIGITS, generator=draw), torch.randint(10, (3, 16), generator=draw)
    tasks = [4, 0, 7]
    together = SupSup(NETWORKS[network](), **options)
    together.live.make_room(3)
    together.begin_task(*tasks)
    logits = together.forward_live(images)
    (nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) * 3).backward()
    for row, task in enumerate(tasks):
        alone = SupSup(NETWORKS[network](), **options)
        alone.begin_task(task)
        own = alone(images[row], task)
        nn.functional.cross_entropy(own, labels[row]).backward()
        torch.testing.assert_close(logits[row], own)
        torch.testing.assert_close(together.live.values.grad[row], alone.live.values.grad[0])
        torch.testing.assert_close(together.live.statistics[row], alone.live.statistics[0])
        # In validation, one at a time.
        torch.testing.assert_close(together.eval()(images[row], task), alone.eval()(images[row], task))
        together.train()


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, _ = fit(digits_lenet(), permuted(at_once=2), folder=tmp_path)
    path = tmp_path / "last.ckpt"
    fit(digits_lenet(), permuted(at_once=2), folder=tmp_path, callbacks=[StopAfter(1, path)])
    resumed, _ = fit(digits_lenet(), permuted(at_once=2), folder=tmp_path, checkpoint=path)
    assert torch.equal(resumed.method.bank.packed, whole.method.bank.packed)
    with pytest.raises(MismatchError, match=r"data\.tasks_at_once=2 there, 1 here"):
        fit(digits_lenet(), permuted(at_once=1), folder=tmp_path, checkpoint=path)


def test_a_resume_between_the_epochs_of_a_group_ends_with_the_same_bits(tmp_path):
    def data():
        return PermutedDigits(num_tasks=4, epochs_per_task=3, tasks_at_once=2)

    whole, _ = fit(digits_lenet(), data(), folder=tmp_path)
    path = tmp_path / "last.ckpt"
    fit(digits_lenet(), data(), folder=tmp_path, callbacks=[StopAfter(4, path)])
    resumed, _ = fit(digits_lenet(), data(), folder=tmp_path, checkpoint=path)
    assert torch.equal(resumed.method.bank.packed, whole.method.bank.packed)


def test_a_checkpoint_loads_into_a_module_that_trains_one_by_one(tmp_path):
    module, trainer = fit(digits_lenet(), permuted(at_once=2, num_tasks=2), folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = ContinualModule(digits_lenet(), inference=OneShot())
    fresh.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"])
    assert torch.equal(fresh.method.bank.packed, module.method.bank.packed)


def test_command_line_and_results(tmp_path):
    common = ["data.num_tasks=5", "data.steps_per_task=30", "eval_at=[1,3]", *GIVEN]
    run_cli_here("data.tasks_at_once=auto", *common, "hydra.run.dir=out", cwd=tmp_path)
    done = run_cli_here("data.tasks_at_once=2", *common, "hydra.run.dir=two", cwd=tmp_path)
    assert "data.tasks_at_once=2: about" in done.stdout
    assert "task 5/5  validation accuracy" in done.stdout
    auto, two = (read_json(tmp_path / name / "results.json") for name in ("out", "two"))
    assert (auto["tasks_at_once"], two["tasks_at_once"]) == (5, 2)
    assert auto["accuracy_per_task"] == pytest.approx(two["accuracy_per_task"], abs=0.01)
    assert len(two["seconds_per_task"]) == 5
    rows = (tmp_path / "two" / "accuracy_matrix.csv").read_text().splitlines()
    assert [row.count(",") - row.count(",,") > 0 and row.split(",")[1] != "" for row in rows[1:]] == [
        False,
        True,  # 1 was passed by here
        False,
        True,  # and 3 here
        True,
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.tasks_at_once=0"], "data.tasks_at_once=0 must be an integer of at least 1, or auto"),
        (["data.tasks_at_once=all"], "data.tasks_at_once='all' must be an integer of at least 1, or auto"),
        (["data.tasks_at_once=2", "method=psp"], "data.tasks_at_once=2 is for method=supsup; PSP trains one"),
        (["data.tasks_at_once=2", "scenario=gg", "mask.init=transfer"], "mask.init=transfer trains one task after"),
        (["data.tasks_at_once=2", "scenario=nns"], "data.tasks_at_once=2 needs to know which tasks"),
        (["data.tasks_at_once=2", "+trainer.gradient_clip_val=1.0"], "clips the norm of all 2 tasks' gradients"),
        (["data.tasks_at_once=2", "data.on_error=skip", "data=image_folder"], "data.on_error=skip makes batches"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(overrides, message, tmp_path):
    done = run_cli_here("data.num_tasks=2", "data.steps_per_task=5", *overrides, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_networks_that_draw_at_random_are_refused(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 20, bias=False))
    with pytest.raises(ConfigurationError, match=r"cannot be trained on 2 tasks .* use data.tasks_at_once=1"):
        fit(SupSup(network), permuted(at_once=2, num_tasks=2), folder=tmp_path)


def test_tasks_of_different_lengths_are_refused(tmp_path):
    def data(at_once):
        split = Split(Digits(), classes_per_task=4)
        return ContinualDataModule(split, epochs_per_task=1, batch_size=32, tasks_at_once=at_once)

    fit(digits_lenet(), data(2), folder=tmp_path)  # 4 and 4 classes, then 2 by themselves
    with pytest.raises(ConfigurationError, match=r"tasks 0 and 2 in the same steps"):
        fit(digits_lenet(), data(3), folder=tmp_path)


def test_batches_that_differ_in_shape_are_refused():
    loaders = [[(torch.zeros(size, 3), torch.zeros(size))] for size in (4, 5)]
    with pytest.raises(DataError, match=r"shapes \(4, 3\), \(5, 3\)"):
        next(iter(SideBySide(loaders)))


def test_optimizers_that_mix_weights_are_found_out(tmp_path):
    def normalised(parameters):
        class Normalised(torch.optim.SGD):
            def step(self, closure=None):
                for parameter in self.param_groups[0]["params"]:
                    parameter.grad /= parameter.grad.norm()
                return super().step(closure)

        return Normalised(parameters, lr=0.1)

    for elementwise in (
        default_optimizer,
        torch.optim.RMSprop,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    ):
        assert is_elementwise(elementwise)
    for mixing in (normalised, torch.optim.LBFGS, torch.optim.Adafactor):
        assert not is_elementwise(mixing)
    for mixing in (normalised, torch.optim.LBFGS):
        with pytest.raises(ConfigurationError, match="does not treat each weight by itself"):
            fit(digits_lenet(), permuted(at_once=2), folder=tmp_path, optimizer=mixing)
    with pytest.raises(ConfigurationError, match="The optimizer's options do not work"):
        fit(digits_lenet(), permuted(at_once=2), folder=tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=-1))


def test_a_network_for_other_images_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigurationError, match=r"does not take inputs of shape \[1, 8, 8\]"):
        fit(SupSup(LeNet(output_size=20)), permuted(at_once=2), folder=tmp_path)


def test_a_trainer_that_was_not_told_is_refused(tmp_path):
    data = permuted(at_once="auto")
    with pytest.raises(ConfigurationError, match=r"plan_training"):
        _ = data.num_epochs
    with pytest.raises(ConfigurationError, match="scenario=nns does not tell"):
        Unannounced(permuted(at_once=2))


def test_predicted_bytes_are_those_of_the_tensors():
    method = digits_lenet()
    images = torch.randn(4, *DIGITS)
    predicted = training_bytes(method, images, batch_size=100, make_optimizer=default_optimizer)
    weights = 4 * 59_200  # 64 x 300 + 300 x 100 + 100 x 100
    # Adam keeps two numbers per weight; ReLUs keep their outputs, the matrix products share them; inputs 64 numbers.
    assert predicted == pytest.approx(6 * weights + 100 * 4 * (300 + 100 + 64), rel=0.01)
    assert fitting(method, predicted, on_accelerator=False) == 8
    assert fitting(method, 2**50, on_accelerator=False) == 1
    assert fitting(SupSup(convolutions()), predicted, on_accelerator=False) == 1
    assert fitting(SupSup(nn.Linear(2000, 1000)), predicted, on_accelerator=False) == 1


def test_auto_is_one_for_methods_that_train_one_by_one(tmp_path):
    network = LeNet(output_size=10, input_shape=DIGITS)
    module, _ = fit(
        PSP(network), permuted(at_once="auto", num_tasks=2, steps=5), folder=tmp_path, scenario=GG, inference=Given()
    )
    assert len(module.method.tasks) == 2


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_compiled_network_learns_the_same_masks(at_once, tmp_path):
    banks = []
    for compiled in (False, True):
        method = SupSup(convolutions(), compile=compiled)
        data = permuted(at_once=at_once, num_tasks=2, steps=12)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        module, _ = fit(method, data, folder=tmp_path, inference=OneShot(images="batch"))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs) == compiled
        banks.append(module.method.bank)
    assert differing(*banks) < 2e-4
    torch.testing.assert_close(banks[1].statistics, banks[0].statistics, rtol=1e-3, atol=1e-4)


def test_a_network_that_cannot_be_compiled_is_refused(tmp_path):
    done = run_cli_here(
        "method.compile=true", "data.num_tasks=1", cwd=tmp_path, check=False, PATH="/nowhere",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "LeNet cannot be compiled here" in done.stderr
    assert "use method.compile=false" in done.stderr
    assert "Traceback" not in done.stderr


def test_mixed_precision_and_clipped_values_go_with_it(tmp_path):
    run_cli_here(
        "trainer=amp", "+trainer.gradient_clip_val=1.0", "+trainer.gradient_clip_algorithm=value",
        "optimizer.fused=false", "data.tasks_at_once=2", "data.num_tasks=2", "data.steps_per_task=60", *GIVEN,
        "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert read_json(tmp_path / "out" / "results.json")["average_accuracy"] > 0.6


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_fused_optimizer_with_clipping_in_mixed_precision_is_refused(at_once, tmp_path):
    clipped = ["trainer=amp", "+trainer.gradient_clip_val=1.0", "+trainer.gradient_clip_algorithm=value"]
    done = run_cli_here(
        *clipped, f"data.tasks_at_once={at_once}", "data.num_tasks=2", *GIVEN, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "add optimizer.fused=false" in done.stderr


def test_a_method_that_was_trained_is_copied_whole():
    method = SupSup(nn.Sequential(nn.Flatten(), nn.Linear(64, 20)))
    method.live.make_room(2)
    method.begin_task(0, 1)
    images = torch.randn(2, 4, *DIGITS)
    before = method.forward_live(images)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(method)))
    with torch.no_grad():
        copied.network[1].bias += 1
    torch.testing.assert_close(copied.forward_live(images), before + 1)


def test_lines_for_tasks_say_nothing_of_epochs_that_were_not_validated(tmp_path):
    done = run_cli_here(
        "data.tasks_at_once=2", "data.num_tasks=5", "data.steps_per_task=10", "+trainer.check_val_every_n_epoch=2",
        *GIVEN, cwd=tmp_path,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("task ")]
    assert ["validation" in line for line in lines] == [False, False, True, True, False]


def test_validation_without_training_says_so(tmp_path):
    module, data = ContinualModule(digits_lenet()), permuted(at_once=1)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="Tasks 0 to 4 of data.num_tasks=5 were never learned"):
        trainer.validate(module, data, verbose=False)


@pytest.mark.slow
def test_two_processes_learn_the_same_masks(tmp_path):
    common = ["data.tasks_at_once=2", "data.num_tasks=3", "data.steps_per_task=20", *GIVEN, "~callbacks.progress"]
    banks = []
    for trainer in ("cpu", "ddp_cpu"):
        run = run_cli_here if trainer == "cpu" else run_cli
        run(f"trainer={trainer}", *common, f"hydra.run.dir={trainer}", cwd=tmp_path)
        method = digits_lenet()
        method.load(tmp_path / trainer / "mask_bank.safetensors")
        banks.append(method.bank)
    assert differing(*banks) < 2e-4
