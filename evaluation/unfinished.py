"""Results of models that are already measured, kept beside the report until it is written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kvfold.convert.output.files import write_whole

PARTIAL = "report.partial.json"


class _Kept(BaseModel):
    """The file: results, and a checksum without which none of them is believed."""

    results: dict[str, dict[str, Any]]
    checksum: str


class Unfinished:
    """A file of results, each under a key made from all that decides it; nothing is written without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / PARTIAL
        self.results: dict[str, dict[str, Any]] = {}
        if self.file and self.file.is_file():
            try:
                kept = _Kept.model_validate_json(self.file.read_bytes())
            except ValidationError:  # another version's, or damaged
                return
            if kept.checksum == _checksum(kept.results):
                self.results = kept.results

    def write(self) -> None:
        """Write the file anew."""
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            results = json.loads(json.dumps(self.results))  # as they will be read: all keys texts
            write_whole(self.file, json.dumps({"results": results, "checksum": _checksum(results)}))


def _checksum(results: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def key_of(decided: dict[str, Any], *folders: Path) -> str:
    """What decides a result and the checkpoints as one key: a file that changes its size or its time makes another one."""
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix == ".safetensors" or file.name in ("config.json", "kvfold.json")
    ]
    return hashlib.sha256(json.dumps([decided, files], sort_keys=True).encode()).hexdigest()
