"""The package's own layout: no import circle, few modules at its top, and a map that names each of them."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "supsup_lightning"
FILES = {path.relative_to(ROOT): path for path in PACKAGE.rglob("*.py")}  # symbolic links to folders are not followed
FILES |= {
    Path("supsup_lightning") / path.relative_to(ROOT): path
    for path in [*(ROOT / "callbacks").rglob("*.py"), ROOT / "train.py"]
}
MODULES = {
    ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path
    for name, path in FILES.items()
    if "conf" not in name.parts
}


def imported(path: Path) -> set[str]:
    """Own modules that a file imports, within functions as well; for type checkers alone does not count."""
    tree = ast.parse(path.read_text())
    unchecked = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(part) for node in unchecked for part in ast.walk(node)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            own = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= own or {node.module}
    return names & MODULES.keys()


def test_no_import_circle():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"import circle: {' -> '.join(error.args[1])}") from error


def test_few_modules_at_the_top():
    top = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "train.py"}  # train.py is a link
    assert len(top) <= 12, sorted(top)


def test_the_map_names_every_module_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (described,) = re.findall(r"^```\n(train\.py.*?)^```", text, re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"[\w]+\.py", described))
    there = {path.name for path in MODULES.values()} - {"__init__.py"}
    assert named - there == set()
    assert there - named == set()


def test_names_tell_files_apart():
    names = [path.name for path in MODULES.values() if path.name != "__init__.py"]
    # `native/build.py` and the like stand alone; only a callback may share the name of what it connects.
    twice = {name for name in names if names.count(name) > 1}
    assert twice <= {"train.py"}, twice
