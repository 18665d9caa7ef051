"""The finished tasks: masks, combinations of masks, Hopfield memories, and their file."""

from supsup_lightning.bank.mask_bank import MaskBank

__all__ = ["MaskBank"]
