"""MkDocs hook: files of the repository outside docs/ become pages, so that links work on GitHub and on the site alike.

README.md is the site's index, and other pages that nav lists (CONTRIBUTING.md and so on) are taken as they are. An
example, a configuration file or a folder that a page links to becomes a page that shows its contents. Links are
written once, for GitHub; here they are rewritten to where their target is on the site.
"""

import logging
import posixpath
import re
from pathlib import Path
from urllib.parse import urldefrag

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger(f"mkdocs.hooks.{__name__}")  # strict mode counts its warnings

ROOT = Path(__file__).parent.parent.parent
INDEX = {"README.md": "index.md"}
# Other Markdown files outside docs/ that are pages.
PAGES = {f"{name.upper()}.md": f"{name}.md" for name in ("contributing", "changelog", "security")}
PAGES |= {"benchmarks/peers.md": "benchmarks/peers.md"}
SOURCE = "source"  # where files are shown that are no pages
GUIDES = "Guides"  # gets pages that nav does not list

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_HREF = re.compile(r'(href=")([^"]+\.(?:md|ipynb))((?:#[^"]*)?")')
_WEB = re.compile(r"[a-z]+:|#|/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; list in nav those of docs/ that it lacks."""
    for name, uri in {**INDEX, **PAGES}.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    pages = [file for file in files if file.src_uri.endswith(".md") and file.abs_src_path]
    shown = {target for file in pages for target in _targets(file) if _uri(target).startswith(f"{SOURCE}/")}
    for target in sorted(shown):
        files.append(File.generated(config, _uri(target), content=_shown(ROOT / target)))
    listed = str(config.nav)
    guides = next(section[GUIDES] for section in config.nav or [] if GUIDES in section)
    for file in files.documentation_pages():
        if file.generated_by is None and f"'{file.src_uri}'" not in listed:
            guides.append(file.src_uri)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files of the repository."""
    own = _place(page.file)
    if own is None:
        return markdown

    def rewritten(match: re.Match) -> str:
        target = _target(own, match[2])
        if target is None:
            return match[0]
        anchor = urldefrag(match[2]).fragment
        there = posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{there}{'#' + anchor if anchor else ''}{match[3]}"

    return _outside_of_code(markdown, lambda text: _LINK.sub(rewritten, text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links of notebooks, which are no Markdown files, so that MkDocs leaves their links alone."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def rewritten(match: re.Match) -> str:
        if _WEB.match(match[2]):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[2]))
        file = files.get_file_from_path(target)
        if file is None:
            logger.warning("%s links to %s, which is no page.", page.file.src_uri, match[2])
            return match[0]
        return f"{match[1]}{file.url_relative_to(page.file)}{match[3]}"

    return _HREF.sub(rewritten, html)


def _outside_of_code(markdown: str, change) -> str:
    """Apply ``change`` to the text between fenced blocks of code."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _place(file: File) -> str | None:
    """Path of a page's file below the root of the repository; None for one that is made here."""
    if not file.abs_src_path:
        return None
    return Path(file.abs_src_path).resolve().relative_to(ROOT).as_posix()


def _targets(file: File) -> set[str]:
    """Files and folders of the repository that a page links to."""
    own = _place(file)
    assert own is not None
    found: set[str] = set()

    def collect(text: str) -> str:
        found.update(target for match in _LINK.finditer(text) if (target := _target(own, match[2])))
        return text

    _outside_of_code((ROOT / own).read_text(encoding="utf-8"), collect)
    return found


def _target(own: str, link: str) -> str | None:
    """Path below the root that a link leads to; None if it leads elsewhere or nowhere, which MkDocs reports."""
    path, _ = urldefrag(link)
    if not path or _WEB.match(link):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
    return target if not target.startswith("..") and (ROOT / target).exists() else None


def _uri(target: str) -> str:
    """Where a file of the repository is among the sources of the site."""
    named = {**INDEX, **PAGES}.get(target)
    if named:
        return named
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{SOURCE}/{target}.md"


def _shown(path: Path) -> str:
    """Page that shows a file, or the files of a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_file():
        return f"# {name}\n\n{_block(path)}"
    inside = sorted({*path.rglob("*.py"), *path.rglob("*.yaml")} - {*path.rglob("__init__.py")})
    return "\n\n".join([f"# {name}", *(f"## {file.relative_to(path).as_posix()}\n\n{_block(file)}" for file in inside)])


def _block(path: Path) -> str:
    language = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    return f"````{language}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"
