"""The documentation: the site builds without a broken link, the API reference is complete, and the notebooks run."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import supsup_lightning
from tests.conftest import ROOT

TOUR = sorted((ROOT / "docs" / "tour").glob("*.ipynb"))


def build(site: Path, *, configuration: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    """Build the site as `make docs` does, but without running the notebooks, which a test of their own does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(configuration), "--site-dir", str(site)]
    environment = {**os.environ, "DOCS_RUN_NOTEBOOKS": "false", "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr  # strict: links, anchors and pages without a place in nav
    return folder


class Page(HTMLParser):
    """Collects the anchors and the links of a page, and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.add(values["href"])
        elif tag in ("script", "img", "iframe") and values.get("src"):
            self.loaded.add(values["src"])


@pytest.mark.slow
def test_links_of_the_built_site(site):
    """What strict mode does not see: links of the API reference and of notebooks, pictures, nothing from elsewhere."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute
            continue
        for link in {*page.links, *page.loaded}:
            if re.match(r"https?:|mailto:|data:", link):
                if link in page.loaded and not link.startswith("data:"):
                    broken.append(f"{path.name} loads {link}")
                continue
            file, _, anchor = link.partition("#")
            target = path if not file else Path(os.path.normpath(path.parent / file))
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif anchor and anchor != "__codelineno" and target in pages and anchor not in pages[target].anchors:
                broken.append(f"{path.relative_to(site)}: {link} has no such anchor")
    assert broken == []


@pytest.mark.slow
def test_every_public_name_has_an_entry_in_the_api_reference(site):
    anchors = {anchor for path in (site / "api").glob("*.html") for anchor in Page(path).anchors}
    assert {name for name in supsup_lightning.__all__ if f"supsup_lightning.{name}" not in anchors} == set()


@pytest.mark.slow
def test_examples_in_docstrings_are_code(site):
    assert not [path.name for path in (site / "api").glob("*.html") if "<blockquote>" in path.read_text()]
    assert "confidence_gain" in (site / "api" / "inference.html").read_text()


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Here\n\n[there](there.md) [anchor](#nowhere)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = re.search(r"^validation:.*?(?=^\S)", settings, re.DOTALL | re.MULTILINE)
    assert validation is not None
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nstrict: true\n{validation[0]}")
    done = build(tmp_path / "site", configuration=tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "there.md" in done.stderr
    assert "#nowhere" in done.stderr


@pytest.mark.slow
def test_the_notebooks_run(tmp_path):
    """One after another in one process, with nothing left of the first, as imports take most of the time."""
    notebooks = [nbformat.read(path, as_version=4) for path in TOUR]
    assert len(notebooks) == 2
    for notebook in notebooks:
        assert not any(cell.get("outputs") for cell in notebook.cells)  # made when the site is built
        together = nbformat.v4.new_notebook(
            cells=[
                cell for notebook in notebooks for cell in (nbformat.v4.new_code_cell("%reset -f"), *notebook.cells)
            ],
            metadata=notebooks[0].metadata,
        )
    NotebookClient(together, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in together.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    assert "tasks found:   [3, 3, 3, 3, 3, 3, 3, 3]" in text
    assert "3 masks for 3 tasks" in text
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
