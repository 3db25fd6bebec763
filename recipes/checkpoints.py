"""The checkpoints of a run: each sealed with the checksums of its files when it is whole, and believed only with them."""

import json
import re
import shutil
from pathlib import Path

from pydantic import TypeAdapter

from kvfold.convert.output.files import checksums, files_under, sync, write_whole

SEAL = "checksums.json"
STATE = "trainer_state.json"


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is whole, once all of it is on the disk."""
    for path in files_under(checkpoint):
        sync(path)
    write_whole(checkpoint / SEAL, json.dumps(checksums(checkpoint)))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = {step: path for step, path in _numbered(folder).items() if (path / SEAL).exists()}
    return whole[max(whole)] if whole else None


def remove_damaged_checkpoints(folder: Path) -> None:
    """Remove what a kill left half written and what has changed since, and what counts on a best step that is gone."""
    sound = {0}
    for step, path in sorted(_numbered(folder).items()):
        if _is_intact(path) and (json.loads((path / STATE).read_text())["best_global_step"] or 0) in {*sound, step}:
            sound.add(step)
        else:
            shutil.rmtree(path)


def remove_old_checkpoints(folder: Path, best: int | None) -> None:
    """Keep two: the newest, and the best or the one before."""
    *before, newest = sorted(_numbered(folder))
    kept = {newest, best if best in before else max(before, default=newest)}
    for step, path in _numbered(folder).items():
        if step not in kept:
            shutil.rmtree(path)


def _numbered(folder: Path) -> dict[int, Path]:
    """Step → checkpoint."""
    found = ((re.fullmatch(r"checkpoint-(\d{1,18})", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _is_intact(checkpoint: Path) -> bool:
    try:
        wanted = TypeAdapter(dict[str, str]).validate_json((checkpoint / SEAL).read_bytes())
    except (OSError, ValueError):
        return False
    return {name: found for name, found in checksums(checkpoint).items() if name != SEAL} == wanted
