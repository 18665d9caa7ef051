"""Independent random streams: the seed of each purpose is a hash of the run's seed and the purpose.

Adding integers (``seed + task``) makes neighbouring seeds share all tasks but one; hashing does not. As no stream
depends on what was drawn before, a task is the same whether it is trained first, last, alone or after a resume.
"""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose.

    >>> derive_seed(0, "scores", 3) == derive_seed(0, "scores", 3)
    True
    >>> derive_seed(0, "scores", 1) == derive_seed(1, "scores", 0)
    False
    """
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose, so that numbers do not depend on the device that uses them."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
