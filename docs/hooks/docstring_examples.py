"""Griffe extension: examples in docstrings (`>>> ...`) are shown as code, where Markdown would see quotations."""

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"(?:^ *>>> .*\n?(?:^ *\S.*\n?)*)", re.MULTILINE)


class DocstringExamples(Extension):
    """Puts a fence around each example of each docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Change the docstring of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match) -> str:
    indent = " " * (len(match[0]) - len(match[0].lstrip(" ")))
    return f"{indent}```pycon\n{match[0].rstrip()}\n{indent}```\n"
