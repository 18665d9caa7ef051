"""How often a finished run's masks are found, by objective, layers whose gradient counts, and candidates tried.

    python benchmarks/find_tasks.py outputs/<run> [--every 5]

The run is one of `train.py` with method=supsup; its configuration and mask bank are read from its folder. The first
image of each test batch finds its task, as it does with inference.images=1, of every so many-th task. A row has the
share that does, and the milliseconds that it takes.
"""

import argparse
from pathlib import Path
from time import perf_counter

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import supsup_lightning.cli.command_line  # noqa: F401 (registers resolvers of the configuration)
from supsup_lightning import Exhaustive, OneShot
from supsup_lightning.inference.inference import Inference

OBJECTIVES = ("superfluous", "entropy")


def ways() -> dict[str, Inference]:
    """Each with every image on its own."""
    found: dict[str, Inference] = {}
    for objective in OBJECTIVES:
        for layers in ("all", "first"):
            found[f"{objective}, {layers}, the gradient alone"] = OneShot(objective, images="each", layers=layers)
            for judge in OBJECTIVES if layers == "first" else (objective,):
                for candidates in (8, 32):
                    found[f"{objective}, {layers}, {candidates} tried by {judge}"] = OneShot(
                        objective, images="each", layers=layers, candidates=candidates, candidate_objective=judge
                    )
    return found | {f"each task tried by {name}": Exhaustive(name, images="each") for name in OBJECTIVES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    config = OmegaConf.load(options.run / ".hydra" / "config.yaml")
    data, method = instantiate(config.data), instantiate(config.method)
    method.load(options.run / "mask_bank.safetensors")
    method.eval()
    tasks = range(0, data.num_tasks, options.every)
    images = [torch.cat([batch[:1] for batch, _ in data.test_loader(task)]) for task in tasks]
    num_images = sum(map(len, images))
    print(f"{num_images} images of {len(tasks)} tasks, {data.num_tasks} to choose from")
    print(f"{'gradient of, layers, candidates':48} {'found':>7} {'ms per image':>12}")
    for name, inference in ways().items():
        started = perf_counter()
        found = sum(
            int((inference(method, own, max(data.num_classes)) == task).sum())
            for task, own in zip(tasks, images, strict=True)
        )
        milliseconds = 1000 * (perf_counter() - started) / num_images
        print(f"{name:48} {found / num_images:7.4f} {milliseconds:12.1f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
