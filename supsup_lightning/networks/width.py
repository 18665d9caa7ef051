"""Width of networks: scaling of layer sizes."""

# A fully connected layer with fewer units would be a bottleneck before the usual ten classes.
LEAST_UNITS = 10


def scaled(size: int, width: float, *, least: int = 1) -> int:
    """Return ``size * width``, rounded, but at least ``least``, or at least ``size`` if that is smaller.

    >>> scaled(300, 0.1), scaled(20, 1.0), scaled(100, 0.01, least=10), scaled(5, 0.0, least=10)
    (30, 20, 10, 5)
    """
    return max(min(size, least), round(size * width))
