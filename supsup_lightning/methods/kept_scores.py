"""Scores of finished tasks that may be trained again, and where they are kept."""

from typing import Any

from torch import Tensor, nn

from supsup_lightning.errors import check_choice

PLACES = ("device", "host", "bits")


class KeptScores(nn.Module):
    """Scores ``(weights,)`` by task; part of `state_dict`.

    Args:
        place: ``device``: beside the network, 4 bytes per weight and task. ``host``: as many, in the main
            memory, copied when a task is trained again. ``bits``: nowhere; they are made anew from the mask, which
            costs no memory and forgets how far each weight was from changing.

    Checkpoints hold what is kept, 4 bytes per weight and task.
    """

    def __init__(self, place: str) -> None:
        super().__init__()
        check_choice("discovery.scores", place, PLACES)
        self.place = place
        self._scores: dict[int, Tensor] = {}

    def set(self, task: int, scores: Tensor) -> None:
        """Keep a copy of a task's scores."""
        if self.place == "device":
            self._scores[task] = scores.detach().clone()
        elif self.place == "host":
            self._scores[task] = scores.detach().to("cpu", copy=True)

    def get(self, task: int) -> Tensor | None:
        """Kept scores of ``task``, or None."""
        return self._scores.get(task)

    def _apply(self, fn, recurse=True):
        # `.to()` of the whole module; scores on the host stay there.
        super()._apply(fn, recurse)
        if self.place == "device":
            self._scores = {task: fn(scores) for task, scores in self._scores.items()}
        return self

    def num_bytes(self) -> int:
        """Bytes that they take."""
        return sum(scores.numel() * scores.itemsize for scores in self._scores.values())

    def get_extra_state(self) -> dict[str, Any]:
        """State for `state_dict`."""
        return {"scores": self._scores}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load from `state_dict`, to the device if that is their place."""
        self._scores = {}
        for task, scores in state["scores"].items():
            self.set(task, scores)
