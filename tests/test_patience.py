"""Early stopping of a task: data.patience."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from supsup_lightning import LowerBound, SupSup, Unannounced
from supsup_lightning.callbacks.task_boundary import boundary_of
from supsup_lightning.errors import ConfigurationError, MismatchError
from tests.test_trainer import Stop, make_data, make_model, make_trainer, trained

LENGTH = {"epochs_per_task": 6, "batch_size": 512, "validation_share": 0.05}


def patient(**options):
    return make_data(2, **{**LENGTH, "patience": 2, **options})


def masks_of_each_epoch(folder, **options):
    """Masks and validation accuracies after each epoch of a training without patience."""
    import lightning as L

    class Record(L.Callback):
        def __init__(self):
            self.masks, self.statistics, self.accuracies = [], [], []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.masks.append(pl_module.method.rule(pl_module.method.live.values[0]) > 0)
                self.statistics.append(pl_module.method.live.statistics[0].clone())
                self.accuracies.append(pl_module.validation_accuracy.compute()[0].item())

    record = Record()
    trained(make_data(2, **LENGTH), record, folder=folder)
    return record


def test_a_task_ends_early_with_the_mask_of_its_best_epoch(tmp_path):
    record = masks_of_each_epoch(tmp_path)
    data = patient()
    model, trainer = trained(data, folder=tmp_path)
    finished = boundary_of(trainer).patience.finished
    steps = 0
    for task in range(2):
        accuracies = record.accuracies[6 * task :][:6]
        best, epochs = 0, 6
        for epoch, accuracy in enumerate(accuracies):
            best = epoch if accuracy > accuracies[best] else best
            if epoch - best >= 2:
                epochs = epoch + 1
                break
        assert finished[task] == (epochs, pytest.approx(accuracies[best]))
        assert torch.equal(model.method.bank.get(task).bool(), record.masks[6 * task + best])
        assert torch.equal(model.method.bank.get_statistics(task), record.statistics[6 * task + best])
        steps += epochs * data.steps_per_epoch(task)
    assert any(epochs < 6 for epochs, _ in finished.values())  # otherwise this says nothing
    assert trainer.global_step == steps  # epochs that are left trained nothing
    assert trainer.current_epoch == data.num_epochs
    trainer.test(model, data, verbose=False)


@pytest.mark.parametrize("epoch", range(1, 12, 2))
def test_a_resumed_task_ends_with_the_same_bits(epoch, tmp_path, whole):
    class StopEpoch(Stop):
        def on_train_batch_end(self, *_): ...

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == epoch

    trained(patient(), StopEpoch(0), ModelCheckpoint(tmp_path, filename="last"), folder=tmp_path)
    data, model = patient(), make_model()
    trainer = make_trainer(model, data, folder=tmp_path)
    last = max(tmp_path.glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    trainer.fit(model, data, ckpt_path=str(last))
    assert torch.equal(model.method.bank.packed, whole[0].method.bank.packed)
    assert torch.equal(model.method.bank.statistics, whole[0].method.bank.statistics)
    assert boundary_of(trainer).patience.finished == boundary_of(whole[1]).patience.finished


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two tasks with patience, from end to end."""
    return trained(patient(), folder=tmp_path_factory.mktemp("whole"))


def test_the_last_checkpoint_has_all_tasks(tmp_path, whole):
    checkpoints = ModelCheckpoint(tmp_path, filename="last")
    trained(patient(), checkpoints, folder=tmp_path)
    data, model = patient(), make_model()
    trainer = make_trainer(model, data, folder=tmp_path)
    trainer.test(model, data, ckpt_path=checkpoints.best_model_path, verbose=False)
    assert torch.equal(model.method.bank.packed, whole[0].method.bank.packed)


def test_methods_that_train_weights_have_patience_as_well(tmp_path):
    _, trainer = trained(patient(), folder=tmp_path, method=LowerBound)
    assert len(boundary_of(trainer).patience.finished) == 2


def test_each_trial_of_a_search_has_patience(tmp_path):
    data = patient()
    model = make_model(
        method=lambda network: SupSup(network, rule="topk", sparsity="auto", search_candidates=[0.5, 0.7])
    )
    trainer = make_trainer(model, data, folder=tmp_path)
    trainer.fit(model, data)
    assert trainer.current_epoch == data.num_epochs == 24
    for task, (epochs, _) in boundary_of(trainer).patience.finished.items():
        assert len(model.method.search.tried[task]) == 2
        assert 2 < epochs < 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "data.patience=0"),
        ({"epochs_per_task": 1}, "data.patience=2 counts epochs, .* data.epochs_per_task"),
        ({"tasks_at_once": 2}, "data.patience=2 .* data.tasks_at_once=2"),
    ],
)
def test_patience_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        patient(**options)


def test_patience_needs_a_task_and_its_validation_images(tmp_path):
    with pytest.raises(ConfigurationError, match="data.patience=2 .* scenario=nns does not tell"):
        Unannounced(patient())
    for options in ({"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 0.5}):
        data, model = patient(), make_model()
        with pytest.raises(
            ConfigurationError, match="data.patience=2 goes by validation images at the end of each epoch"
        ):
            make_trainer(model, data, folder=tmp_path, **options).fit(model, data)
    assert patient(tasks_at_once="auto").tasks_at_once == 1
    with pytest.raises(MismatchError, match="data.patience=None there, 2 here"):
        patient().load_state_dict(make_data(2, **LENGTH).state_dict())
