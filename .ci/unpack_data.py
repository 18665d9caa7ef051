"""Unpack archives of data sets into the folder that tests look for: `python unpack_data.py <archives> <folder>`.

Takes what there is of torchvision's gz files of the MNIST family, CIFAR-100 in xz parts, tar.gz trees and zip files.
"""

import gzip
import lzma
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path


def unpack(archives: Path, folder: Path) -> None:
    """Everything of ``archives`` that ``folder`` does not have yet."""
    for path in sorted(archives.glob("*/raw/*.gz")):
        target = folder / path.relative_to(archives).with_suffix("")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    cifar = archives / "cifar-100-python"
    target = folder / "cifar-100-python"
    if cifar.is_dir() and not target.exists():
        target.mkdir(parents=True)
        for half in ("train", "test"):
            parts = sorted(cifar.glob(f"{half}.xz*"))
            (target / half).write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in parts)))
        shutil.copy(cifar / "meta", target)
    for path in archives.glob("*.tar.gz"):
        if not (folder / path.name.removesuffix(".tar.gz")).exists():
            with tarfile.open(path) as archive:
                safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
                archive.extractall(folder, **safely)
    for path in archives.glob("*/*.zip"):
        if not (folder / path.stem).exists():
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
