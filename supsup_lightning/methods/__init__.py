"""How a task becomes effective parameters: one file a method, one small surface for all (`Method`)."""

from supsup_lightning.methods.hopfield import HopSupSup
from supsup_lightning.methods.method import Method, Offer
from supsup_lightning.methods.supsup import SupSup

__all__ = ["HopSupSup", "Method", "Offer", "SupSup"]
