"""Files of JSON that others wrote: read whole or refused in one line, and checked field by field where kvfold uses them."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvfold.errors import UserError

MOST_BYTES = 200 << 20
"""No config, index or tokenizer is larger; what is would only fill the memory."""
Checked = TypeVar("Checked", bound=BaseModel)


def read_json(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """A JSON object. Raises UserError with the remedy when the file is missing, no plain file, or holds none."""
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise UserError(f"{path} is no file: {remedy}")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than a file of its kind can have: {remedy}")
        loaded = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
        if not isinstance(loaded, dict):
            raise ValueError("no object in braces")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {remedy}") from None
    return loaded


def _integer(digits: str) -> int:
    """Raises ValueError for one beyond what floating-point arithmetic takes."""
    if len(digits) > 100:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def checked(kind: type[Checked], data: Any, where: str, remedy: str) -> Checked:
    """`data` as a `kind`. Raises UserError naming the first field that is wrong, where, and the remedy."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:120]
        got = "" if first["type"] == "missing" else f", got {first['input']!r:.60}"
        raise UserError(f"{where} is damaged ({place}: {first['msg'].lower()}{got}): {remedy}") from None
