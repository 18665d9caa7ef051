"""How often a finished run's masks are found, by objective, layers whose gradient counts, and candidates tried.

    python benchmarks/find_tasks.py outputs/<run> [--images 16] [--candidates 1 8]

The run is one of `train.py` with method=supsup; its configuration and mask bank are read from its folder. Some test
images of each task find their task, each by itself; a row has the share that does, for both objectives, and the
milliseconds that it takes.
"""

import argparse
from pathlib import Path
from time import perf_counter

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from supsup_lightning import Exhaustive, OneShot, command_line  # noqa: F401 (registers what the configuration needs)
from supsup_lightning.inference.inference import Inference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=16, help="of each task")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 8, 16])
    options = parser.parse_args()
    config = OmegaConf.load(options.run / ".hydra" / "config.yaml")
    data, method = instantiate(config.data), instantiate(config.method)
    method.load(options.run / "mask_bank.safetensors")
    method.eval()
    batches = [next(iter(data.test_loader(task)))[0][: options.images] for task in range(data.num_tasks)]
    num_images = sum(map(len, batches))
    ways: dict[str, Inference] = {
        f"{objective}, {layers}, {candidates}": OneShot(objective, images="each", candidates=candidates, layers=layers)
        for objective in ("superfluous", "entropy")
        for layers in ("all", "first")
        for candidates in options.candidates
    }
    ways |= {f"{objective}, try each task": Exhaustive(objective, images="each") for objective in ("superfluous",)}
    print(f"{num_images} images of {data.num_tasks} tasks\nobjective, layers, candidates      found    ms an image")
    for name, inference in ways.items():
        started, found = perf_counter(), 0
        for task, images in enumerate(batches):
            found += int((inference(method, images, max(data.num_classes)) == task).sum())
        milliseconds = 1000 * (perf_counter() - started) / num_images
        print(f"{name:32} {found / num_images:8.4f} {milliseconds:9.1f}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
