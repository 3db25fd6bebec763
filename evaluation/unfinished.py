"""Results of models that are already measured, kept beside the report until it is written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvfold.convert.files import write_whole
from kvfold.convert.jsonfile import read_json
from kvfold.errors import UserError
from kvfold.evaluation.schema import Finished

PARTIAL = "report.partial.json"


class Unfinished:
    """A file of results, each under a key made from all that decides it; nothing is written without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / PARTIAL
        self.results: dict[str, dict[str, Any]] = {}
        if self.file and self.file.exists():
            try:
                loaded = read_json(self.file)
            except UserError:  # nothing is lost but time
                loaded = {}
            self.results = {key: result for key, result in loaded.items() if _is_whole(result)}

    def write(self) -> None:
        """Write the file anew."""
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps(self.results))


def _is_whole(result: Any) -> bool:
    try:
        Finished.model_validate(result)
    except ValidationError:
        return False
    return True


def key_of(decided: dict[str, Any], *folders: Path) -> str:
    """What decides a result and the checkpoints as one key: a file that changes its size or its time makes another one."""
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix == ".safetensors" or file.name in ("config.json", "kvfold.json")
    ]
    return hashlib.sha256(json.dumps([decided, files], sort_keys=True).encode()).hexdigest()
