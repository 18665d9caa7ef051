"""The gate: which task an input belongs to, by a linear discriminant over frozen features; no image is stored."""

from supsup_lightning.gate.gate import Gate

__all__ = ["Gate"]
