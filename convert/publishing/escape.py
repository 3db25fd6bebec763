"""Names that others chose (folders, texts, tasks, what kvfold.json says), made fit to be shown."""

import unicodedata
from collections.abc import Callable
from typing import Any

_MARKUP = {ord(char): f"&#{ord(char)};" for char in "|[]`*$\\~"} | {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of Unicode that move the cursor, turn the direction of writing, break lines, or are no characters."""


def visible(text: object) -> str:
    """One line that shows what it holds: a control character as its escape, `\\n`, `\\x1b`, `\\u202e`."""
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in _HIDDEN else char for char in str(text))


def markdown(text: object) -> str:
    """The same as plain text inside a line or a table of Markdown: no HTML, link, code, formula or cell begins in it."""
    return visible(text).translate(_MARKUP)


def all_markdown(data: Any) -> Any:
    """`markdown` of every text in JSON data."""
    return each(data, markdown)


def each(data: Any, change: Callable[[str], str]) -> Any:
    """JSON data with every text in it changed."""
    if isinstance(data, dict):
        return {change(key): each(value, change) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [each(value, change) for value in data]
    return change(data) if isinstance(data, str) else data
