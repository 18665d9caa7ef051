"""Import of modules in the current folder, only if the configuration names them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

# Folder, and names of the modules imported from it, for new processes (workers) that unpickle their classes.
_VARIABLE = "SUPSUP_OWN_MODULES"


class OwnModules(MetaPathFinder):
    """Finder of modules in ``folder``, for imports by Hydra (`_target_`) and by modules found there.

    It is the last finder, so that no file in the folder hides an installed package. Imports by other libraries, of
    optional packages such as `pandas`, do not search the folder.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.names = set(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec of a top-level module if it may be imported; a package finds its own modules."""
        if path is not None or not (name in self.names or self._is_asked_for(name)):
            return None
        spec = PathFinder.find_spec(name, [str(self.folder)])
        if spec is not None:
            self.names.add(name)
            os.environ[_VARIABLE] = os.pathsep.join([str(self.folder), *sorted(self.names)])
        return spec

    def _is_asked_for(self, name: str) -> bool:
        frame = sys._getframe(2)
        while frame.f_back and frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib")):
            frame = frame.f_back
        importer = frame.f_globals.get("__name__", "")
        named = importer.startswith("hydra.") and name != "hydra_plugins"  # Hydra imports its plug-ins by itself
        return named or importer.partition(".")[0] in self.names


@contextmanager
def from_current_folder() -> Iterator[None]:
    """Let the configuration name modules of the current folder within the block."""
    finder = OwnModules(Path.cwd())
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        os.environ.pop(_VARIABLE, None)


if _VARIABLE in os.environ:  # in a process that a run started
    _folder, *_names = os.environ[_VARIABLE].split(os.pathsep)
    sys.meta_path.append(OwnModules(Path(_folder), tuple(_names)))
