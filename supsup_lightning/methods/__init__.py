"""How a task becomes effective parameters: one file a method, one small surface for all (`Method`)."""

from supsup_lightning.methods.method import Method
from supsup_lightning.methods.supsup import SupSup

__all__ = ["Method", "SupSup"]
