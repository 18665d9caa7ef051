"""The PermutedMNIST job of benchmarks/peers.md in other libraries: CPU seconds of the whole process, and accuracy.

Runs in an environment of the library's own, not in this project's; peers.md has the commands.
"""

import argparse
import csv
import json
import resource
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

WIDTHS = [784, 300, 100, 10]


def network():
    """LeNet 300-100 with biases, as these libraries would be used."""
    from torch import nn

    layers = [nn.Flatten()]
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def avalanche(args: argparse.Namespace) -> list[float]:
    """Accuracy of each task after all of them."""
    import torch
    from avalanche.benchmarks.classic import PermutedMNIST
    from avalanche.evaluation.metrics import accuracy_metrics
    from avalanche.models.packnet import PackNetModel
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    method = args.job.removeprefix("avalanche-")
    model, options, make = network(), {"train_epochs": 1}, supervised.Naive
    if method == "ewc":
        options["ewc_lambda"], make = args.ewc_lambda, supervised.EWC
    if method == "packnet":  # an epoch to train, and one after pruning
        model, make = PackNetModel(model), supervised.PackNet
        options |= {"train_epochs": 2, "post_prune_epochs": 1, "prune_proportion": 0.5}
    benchmark = PermutedMNIST(args.tasks, seed=args.seed, dataset_root=args.root, return_task_id=method == "packnet")
    strategy = make(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=args.lr),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=128,
        eval_mb_size=128,
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
        **options,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    found = strategy.eval(benchmark.test_stream)
    return [value for name, value in found.items() if name.startswith("Top1_Acc_Exp/")]


def clarena(args: argparse.Namespace) -> list[float]:
    """Accuracy of each task after all of them, with the task given."""
    from clarena.pipelines import CLMainExperiment
    from omegaconf import OmegaConf

    folder = Path(tempfile.mkdtemp())
    configuration = {
        "pipeline": "CL_MAIN_EXPR",
        "expr_name": args.job,
        "cl_paradigm": "TIL",
        "train_tasks": args.tasks,
        "eval_after_tasks": args.tasks,  # it tests the tasks that were tested before, so after each of them
        "global_seed": args.seed,
        "cl_dataset": {
            "_target_": "clarena.cl_datasets.PermutedMNIST",
            "root": args.root,
            "num_tasks": args.tasks,
            "validation_percentage": 0.05,
            "batch_size": 128,
            "permutation_mode": "all",
        },
        "cl_algorithm": {
            "_target_": "clarena.cl_algorithms.HAT",
            "adjustment_mode": "hat",
            "s_max": 400,
            "clamp_threshold": 6,
            "mask_sparsity_reg_factor": 0.75,
        },
        "backbone": {
            "_target_": "clarena.backbones.HATMaskMLP",
            "input_dim": WIDTHS[0],
            "hidden_dims": WIDTHS[1:2],
            "output_dim": WIDTHS[2],
            "gate": "sigmoid",
        },
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": args.lr},
        # Required; it changes nothing within one epoch.
        "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.ConstantLR", "_partial_": True, "factor": 1.0},
        "trainer": {
            "_target_": "lightning.Trainer",
            "accelerator": "cpu",
            "max_epochs": 1,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "default_root_dir": str(folder),
        },
        "metrics": [{"_target_": "clarena.metrics.CLAccuracy", "save_dir": str(folder)}],
        "lightning_loggers": {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)}},
        "callbacks": [{"_target_": "lightning.pytorch.callbacks.Timer"}],
        "output_dir": str(folder),
        "misc": {"none": True},
    }
    CLMainExperiment(OmegaConf.create(configuration)).run()
    *_, last = csv.DictReader((folder / "acc.csv").open())
    return [float(last[f"test_on_task_{task}"]) for task in range(1, args.tasks + 1)]


JOBS = {
    "avalanche-naive": avalanche,
    "avalanche-ewc": avalanche,
    "avalanche-packnet": avalanche,
    "clarena-hat": clarena,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--root", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1, help="clarena rejects 0")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--ewc-lambda", type=float, default=1.0)
    args = parser.parse_args()
    accuracy = JOBS[args.job](args)
    assert len(accuracy) == args.tasks, accuracy
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    library = {"avalanche": "avalanche-lib", "clarena": "clarena"}[args.job.partition("-")[0]]
    result = {
        "job": args.job,
        "version": version(library),
        "average_accuracy": round(sum(accuracy) / len(accuracy), 4),
        "accuracy_per_task": [round(value, 4) for value in accuracy],
        "cpu_seconds": round(sum(each.ru_utime + each.ru_stime for each in used), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
