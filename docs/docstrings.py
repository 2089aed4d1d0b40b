"""For mkdocs: turns docstrings into Markdown (an extension of griffe, named in mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:\1.*\S.*\n?)*", re.MULTILINE)
PAIR = re.compile(r"^(    )(\w+), (\w+): ", re.MULTILINE)


def as_markdown(text: str) -> str:
    """An example becomes a block of code, and `a, b: ...` of a list of arguments two entries.

    Markdown takes `>>>` for a quotation.
    """
    text = EXAMPLE.sub(lambda m: f"{m[1]}```pycon\n{m[0].rstrip()}\n{m[1]}```\n", text)
    return PAIR.sub(r"\1\2: see `\3`.\n\1\3: ", text)


class Docstrings(griffe.Extension):
    """Changes each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the text of one docstring."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
