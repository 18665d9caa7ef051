"""Progress bars: a moving one on a terminal, one per task in a notebook, none where the output goes to a file."""

from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar(Protocol):
    """Display of a training or a test in progress."""

    def update(self, done: float, *, description: str, status: str, share: float) -> None:
        """Show progress.

        Args:
            done: part of the total that is done.
            description: the current task, for example ``training task 3/20``.
            status: numbers.
            share: part of the current task that is done, in [0, 1].
        """
        ...

    def print(self, line: str) -> None:
        """Print a line that stays."""
        ...

    def close(self) -> None:
        """Remove the bar."""
        ...


class NoBar:
    """Lines alone."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def update(self, done: float, *, description: str, status: str, share: float) -> None:
        """Show nothing."""

    def print(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, highlight=False)

    def close(self) -> None:
        """Do nothing."""


class TerminalBar(NoBar):
    """One bar for the whole training, with the time left, below the lines of finished tasks."""

    def __init__(self, console: Console, *, total: float, completed: float) -> None:
        super().__init__(console)
        # The time before the numbers, which are cut off on a narrow terminal.
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console, transient=True)
        self.bar = self.progress.add_task("", total=total, status="")
        self.progress.update(self.bar, completed=completed)
        self.progress.start()

    def update(self, done: float, *, description: str, status: str, share: float) -> None:
        """Move the bar."""
        self.progress.update(self.bar, completed=done, description=description, status=status)

    def close(self) -> None:
        """Remove the bar."""
        self.progress.stop()


class NotebookBars(NoBar):
    """One bar per task, which stays when the task is finished; as widgets where ipywidgets is installed."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.bar: Any = None
        self.description = ""

    def update(self, done: float, *, description: str, status: str, share: float) -> None:
        """Move the bar of the current task, and begin one for a new task."""
        if self.bar is None or description != self.description:
            self.close()
            self.bar = _tqdm()(total=100, desc=description, bar_format="{desc} {bar} {postfix}")
            self.description = description
        self.bar.n = round(100 * share)
        self.bar.set_postfix_str(status)

    def print(self, line: str) -> None:
        """Finish the bar with this line beside it."""
        if self.bar is None:
            super().print(line)
            return
        self.bar.n = self.bar.total
        self.bar.set_postfix_str(line)
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def bar_for(console: Console, *, total: float, completed: float = 0) -> Bar:
    """Return the bar that fits the place of the output."""
    if console.is_jupyter:
        return NotebookBars(console)
    return TerminalBar(console, total=total, completed=completed) if console.is_terminal else NoBar(console)


def _tqdm() -> Any:
    """Return the bar of text, unless there are widgets."""
    if find_spec("ipywidgets"):
        from tqdm.notebook import tqdm
    else:
        from tqdm import tqdm
    return tqdm
