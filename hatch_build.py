"""Compiles the C kernel into the package when it is installed, where there is a compiler; works without one."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelBuildHook(BuildHookInterface):
    """Adds the compiled library to a wheel, whose tag then names the platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before files are collected."""
        if self.target_name != "wheel":
            return
        script = Path(self.root) / "supsup_lightning" / "native" / "build.py"
        library = runpy.run_path(str(script))["build"]()
        if library is not None:
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
            build_data["artifacts"].append(str(library.relative_to(self.root)))
