"""Docstrings say what a thing is or returns: none begins with a word that points to something else."""

import ast
import re

import pytest

from tests.conftest import ROOT

FOLDERS = ("supsup_lightning", "callbacks", "tests", "examples", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.resolve() == path)


@pytest.mark.parametrize("word", ["Of", "That", "Likewise"])
def test_no_docstring_begins_with(word):
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and re.match(rf"{word}\b", ast.get_docstring(node) or "")
    ]
    assert len(SOURCES) > 100
    assert found == []


@pytest.mark.parametrize("word", ["rival", "rivals", "landing", "landings"])
def test_words_that_a_stranger_would_stumble_on(word):
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "conf").rglob("*.yaml"), *SOURCES]
    pages = [page for page in pages if page.name not in ("CHANGELOG.md", "test_words.py")]
    assert [page.name for page in pages if re.search(rf"\b{word}\b", page.read_text(), re.IGNORECASE)] == []
