"""Storage of finished tasks: masks, combinations of masks, Hopfield memories, and their file format."""

from supsup_lightning.bank.mask_bank import MaskBank

__all__ = ["MaskBank"]
