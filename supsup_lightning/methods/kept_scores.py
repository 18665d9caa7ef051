"""Scores of finished tasks that may be trained again, and where they are in the meantime."""

from typing import Any

from torch import Tensor, nn

from supsup_lightning.errors import check_choice

PLACES = ("device", "host", "bits")


class KeptScores(nn.Module):
    """Scores ``(weights,)`` by task; part of `state_dict`.

    Args:
        place: ``device``: beside the network, 4 bytes a weight and task of its memory. ``host``: as many, in the main
            memory, copied when a task is trained again. ``bits``: nowhere; they are made anew from the mask, which
            costs no memory and forgets how far each weight was from changing.

    Checkpoints hold what is kept, 4 bytes a weight and task.
    """

    def __init__(self, place: str) -> None:
        super().__init__()
        check_choice("discovery.scores", place, PLACES)
        self.place = place
        self._scores: dict[int, Tensor] = {}

    def set(self, task: int, scores: Tensor) -> None:
        """Keep a copy."""
        if self.place == "device":
            self._scores[task] = scores.detach().clone()
        elif self.place == "host":
            self._scores[task] = scores.detach().to("cpu", copy=True)

    def get(self, task: int) -> Tensor | None:
        """What is kept of ``task``, if anything."""
        return self._scores.get(task)

    def _apply(self, fn, recurse=True):
        # `.to()` of the whole module; scores on the host stay there.
        super()._apply(fn, recurse)
        if self.place == "device":
            self._scores = {task: fn(scores) for task, scores in self._scores.items()}
        return self

    def num_bytes(self) -> int:
        """Memory that they take."""
        return sum(scores.numel() * scores.itemsize for scores in self._scores.values())

    def get_extra_state(self) -> dict[str, Any]:
        """Into `state_dict`."""
        return {"scores": self._scores}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From `state_dict`; they follow the module to its device where that is their place."""
        self._scores = {}
        for task, scores in state["scores"].items():
            self.set(task, scores)
