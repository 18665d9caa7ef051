"""Compile the C kernel at installation; the build hook runs this file, which needs only the standard library."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "packed_bits.c"


def library_path() -> Path:
    """Path of the compiled kernel; its name depends on the source, so that an old kernel is never loaded."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return FOLDER / f"packed_bits-{digest}{'.dylib' if sys.platform == 'darwin' else '.so'}"


def build() -> Path | None:
    """Compile the kernel and return its path; None, with a message, if there is no C compiler or it fails."""
    path = library_path()
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)
    if compiler is None:
        print("no C compiler: products over packed bits will run in PyTorch, several times slower", file=sys.stderr)
        return None
    temporary = path.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(temporary), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the C kernel was not built ({' '.join(command)}):\n{done.stderr}", file=sys.stderr)
        return None
    for old in FOLDER.glob("packed_bits-*"):
        if old != temporary:
            old.unlink()
    temporary.replace(path)
    return path


if __name__ == "__main__":
    build()
