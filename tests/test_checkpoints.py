"""What a kill, a full disk, a damaged byte or a malicious file can do to a checkpoint."""

import errno
import multiprocessing
import os
import resource
import shutil
import time
import zipfile

import lightning as L
import pytest
import torch

from supsup_lightning import ContinualModule, PermutedDigits
from supsup_lightning.errors import DataError, SaveError
from supsup_lightning.files import backup_of, replacing
from supsup_lightning.runs import checkpoints
from supsup_lightning.runs.checkpoints import WholeCheckpoints, damage, whole
from tests.conftest import digits_lenet


def save_again_and_again(path, numbers, sender) -> None:
    """Say a number before its checkpoint is saved; for a process that is killed."""
    torch.set_num_threads(1)  # the pool of threads is not there after a fork
    checkpoint_io = WholeCheckpoints()
    for number in numbers:
        sender.send(number)
        checkpoint_io.save_checkpoint({"number": number, "rows": torch.full((200_000,), number)}, path)


def save(path, number: int) -> None:
    WholeCheckpoints().save_checkpoint({"number": number, "rows": torch.full((5000,), number)}, path)


def load(path) -> int:
    checkpoint = WholeCheckpoints().load_checkpoint(path)
    assert set(checkpoint) == {"number", "rows"}
    assert (checkpoint["rows"] == checkpoint["number"]).all()
    return checkpoint["number"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system for TMPDIR")
def test_a_kill_while_a_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    path, fork, last = tmp_path / "last.ckpt", multiprocessing.get_context("fork"), 0
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=save_again_and_again, args=(path, range(last + 1, last + 1000), sender))
        process.start()
        begun = [receiver.recv() for _ in range(3)][-1]
        time.sleep(delay)
        process.kill()
        process.join()
        while receiver.poll():
            begun = receiver.recv()
        last = load(whole(path))
        assert last in (begun - 1, begun)
        assert load(backup_of(path)) in (last - 1, last)
    for leftover in (
        ".last.77.ckpt",
        ".last.backup.77.ckpt",
    ):  # of kills
        (tmp_path / leftover).touch()
    save(path, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.backup.ckpt", "last.ckpt"]  # no leftovers


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SaveError, match=r"last.ckpt could not be written.*The one before is kept.*resume=true"):
            save(path, 2)
        with pytest.raises(SaveError, match="There is none from before"):
            save(tmp_path / "first.ckpt", 1)
        with (
            pytest.raises(SaveError, match="results.json cannot be written"),
            replacing(tmp_path / "results.json") as t,
        ):
            t.write_bytes(bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_written_to_stops_before_training(tmp_path):
    (tmp_path / "file").write_text("no folder")
    data = PermutedDigits(num_tasks=1, steps_per_task=1)
    module = ContinualModule(digits_lenet())
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[
            *module.task_callbacks(data),
            L.pytorch.callbacks.ModelCheckpoint(dirpath=tmp_path / "file" / "checkpoints"),
        ],
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(SaveError, match="where checkpoints are to go, cannot be written to"):
        trainer.fit(module, data)
    assert not len(module.method.tasks)


def test_a_damaged_checkpoint_is_found_out_and_its_backup_taken(tmp_path, caplog):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    save(path, 2)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (flipped, content[:-1], content[: len(content) // 2], b"", b"PK"):
        path.write_bytes(damaged)
        assert damage(path) is not None
        with pytest.raises(DataError, match=r"is damaged .*The one before it is whole: ckpt_path='.*last.backup.ckpt'"):
            load(path)
        assert load(whole(path)) == 1
        assert "going on from the one before it" in caplog.text
        assert (tmp_path / "last.damaged.ckpt").read_bytes() == damaged
        assert not path.exists()
        assert load(whole(path)) == 1  # again, as `last.ckpt` is missing now
    path.write_bytes(flipped)
    save(path, 3)  # by another process: a damaged checkpoint takes no whole one's place
    assert (load(path), load(backup_of(path))) == (3, 1)
    for file in (path, backup_of(path)):
        file.write_bytes(flipped)
    with pytest.raises(DataError, match="there is no whole one beside it"):
        whole(path)
    assert whole(tmp_path / "none.ckpt") is None


def test_tensors_that_changed_places_are_noticed(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"one": torch.zeros(9), "other": torch.ones(9)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    one, other = (next(name for name in members if name.endswith(f"data/{number}")) for number in (0, 1))
    members[one], members[other] = members[other], members[one]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert damage(path) is None
    with pytest.raises(DataError, match="its tensors are not those that were written"):
        load(path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_malicious_checkpoint_is_refused_without_advice_to_trust_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Malicious()}, path)
    for read in (
        lambda: WholeCheckpoints().load_checkpoint(path),
        lambda: ContinualModule.load_from_checkpoint(path, method=digits_lenet()),
        lambda: ContinualModule.load_from_checkpoint(path, method=digits_lenet(), weights_only=None),
    ):
        with pytest.raises(DataError, match=r"holds \w+.system, which is no tensor, number or text") as refusal:
            read()
        assert "weights_only" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


def test_what_a_resume_would_refuse_is_said_when_it_is_written(tmp_path, caplog):
    checkpoint_io = WholeCheckpoints()
    for _ in range(2):
        checkpoint_io.save_checkpoint({"callbacks": {"own": tmp_path}}, tmp_path / "last.ckpt")
    assert caplog.text.count("cannot be resumed from: it holds pathlib") == 1


def test_a_checkpoint_without_a_digest_is_read(tmp_path):
    torch.save({"number": 1, "rows": torch.ones(5000)}, tmp_path / "old.ckpt")
    assert load(tmp_path / "old.ckpt") == 1


def test_a_file_system_without_hard_links_keeps_a_backup(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for number in (1, 2):
        save(tmp_path / "last.ckpt", number)
    assert (load(tmp_path / "last.ckpt"), load(tmp_path / "last.backup.ckpt")) == (2, 1)


def test_a_plug_in_of_the_users_stays(tmp_path):
    class Own(L.pytorch.plugins.io.TorchCheckpointIO):
        pass

    for plugin, kind in ((Own(), Own), (None, WholeCheckpoints)):
        trainer = L.Trainer(accelerator="cpu", plugins=plugin, logger=False, default_root_dir=tmp_path)
        checkpoints.prepare(trainer, "test")
        assert type(trainer.strategy.checkpoint_io) is kind
    wrapped = L.pytorch.plugins.io.AsyncCheckpointIO()
    trainer = L.Trainer(accelerator="cpu", plugins=wrapped, logger=False, default_root_dir=tmp_path)
    checkpoints.prepare(trainer, "test")
    assert type(wrapped.checkpoint_io) is WholeCheckpoints
    shutil.rmtree(tmp_path / "lightning_logs", ignore_errors=True)
