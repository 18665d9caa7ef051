"""Kills a training while it writes a checkpoint, resumes it, and again; then compares the masks with an unbroken run's.

    python benchmarks/kill_checkpoints.py --kills 50 --tmpdir /dev/shm

A process trains tasks of one step each, on a bank that makes the checkpoint some megabytes, with TMPDIR on another
file system, and gets SIGKILL some milliseconds after the file of a checkpoint begins to grow. Prints how many kills
left a part of a file, how many found a whole checkpoint afterwards, and how many of the finished tasks were lost
besides the one whose checkpoint was being written.
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from supsup_lightning import ContinualModule, LeNet, PermutedDigits, SupSup
from supsup_lightning.runs.checkpoints import WholeCheckpoints, whole

NUM_TASKS = 250


def train(folder: Path, checkpoint: Path | None) -> SupSup:
    """All tasks, or those that are left."""
    module = ContinualModule(SupSup(LeNet(output_size=1000, input_shape=(1, 8, 8))))
    data = PermutedDigits(num_tasks=NUM_TASKS, steps_per_task=1, batch_size=16)
    callbacks = [callback for callback in module.task_callbacks(data) if type(callback).__name__ != "EvaluateSeenTasks"]
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True)
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*callbacks, keep],
        max_epochs=data.num_epochs,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=checkpoint)
    assert isinstance(module.method, SupSup)
    return module.method


def finished(checkpoint: Path | None) -> int:
    """Tasks in a checkpoint."""
    if checkpoint is None:
        return 0
    return len(WholeCheckpoints().load_checkpoint(checkpoint)["state_dict"]["method.bank.tasks"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--tmpdir", default="/dev/shm", help="another file system than that of --folder")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    os.environ["TMPDIR"] = options.tmpdir
    folder = Path(tempfile.mkdtemp(dir=options.folder or Path.cwd()))
    last, fork, draw = folder / "last.ckpt", multiprocessing.get_context("fork"), random.Random(0)
    parts = resumed = lost = before = 0
    for _ in range(options.kills):
        process = fork.Process(target=train, args=(folder, whole(last)))
        process.start()
        written, seen = 0, False  # the kill comes in one of the first checkpoints
        wanted = draw.randint(1, 6)
        while process.is_alive() and written < wanted:
            growing = next(iter(folder.glob(f".last.{process.pid}.ckpt")), None) is not None
            written += growing and not seen
            seen = growing
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.01))
        process.kill()
        process.join()
        parts += any(folder.glob(".last.*.ckpt"))
        found = whole(last)
        now = finished(found)
        resumed += found is not None or before == 0
        lost += max(0, before - now)
        before = now
    resumed_masks = train(folder, whole(last)).bank
    unbroken = train(Path(tempfile.mkdtemp(dir=folder)), None).bank
    same = torch.equal(resumed_masks.packed, unbroken.packed) and torch.equal(resumed_masks.tasks, unbroken.tasks)
    print(f"kills {options.kills}, within a write {parts}, a whole checkpoint afterwards {resumed}, tasks lost {lost}")
    print(f"masks equal to those of an unbroken run: {same} ({len(resumed_masks)} tasks)")


if __name__ == "__main__":
    main()
