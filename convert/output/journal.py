"""What an interrupted run says of itself: what was asked for, and which units of work are done."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvfold.convert.output.files import write_whole
from kvfold.errors import UserError

MOST_NAMED = 5
"""Differences that a refusal names."""


class Begun(BaseModel):
    """The first line: what decides the result."""

    model_config = ConfigDict(extra="forbid")

    job: dict[str, Any]


class Unit(BaseModel):
    """A finished unit of work.

    Attributes:
        unit: its name.
        record: what whoever finished it wants to know of it again.
        tensors: checksums of the tensors that it wrote.
        files: checksums of files beside them, without which the next unit could not go on from here.
    """

    model_config = ConfigDict(extra="forbid")

    unit: str
    record: dict[str, Any]
    tensors: dict[str, str]
    files: dict[str, str]


class Journal:
    """A file with a line for the job and one for every unit, each on the disk before the next begins.

    Attributes:
        units: what is finished, in order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.units: list[Unit] = []
        self._ends = [0]

    def begin(self, job: dict[str, Any]) -> None:
        """Write the first line."""
        write_whole(self.path, Begun(job=job).model_dump_json() + "\n")
        self._ends = [self.path.stat().st_size]

    def read(self, job: dict[str, Any]) -> list[Unit]:
        """The units of a journal that was begun with the same job, up to a line that is torn or damaged.

        Raises UserError when the job was another or cannot be read.
        """
        try:
            first, *lines = self.path.read_bytes().splitlines(keepends=True)
            begun = Begun.model_validate_json(first)
        except (OSError, ValueError):
            raise UserError(f"{self.path} is damaged: start anew with --overwrite in place of --resume") from None
        refuse_other(self.path.parent, begun.job, job)
        self._ends = [len(first)]
        units = []
        for line in lines:
            try:
                units.append(Unit.model_validate_json(line))
            except ValidationError:
                break
            if not line.endswith(b"\n"):
                units.pop()
                break
            self._ends.append(self._ends[-1] + len(line))
        return units

    def keep(self, units: list[Unit]) -> None:
        """Cut off what stands behind the last of these units, the first of those that were read."""
        self.units = units
        if self.path.stat().st_size > self._ends[len(units)]:
            os.truncate(self.path, self._ends[len(units)])

    def append(self, unit: Unit) -> None:
        with self.path.open("ab") as file:
            file.write(unit.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.units.append(unit)


def refuse_other(folder: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError, naming what differs, when `folder` was begun with another job than the one that is wanted now.

    A job is a dict of facts and of dicts of facts.
    """
    if differ := differences(begun, wanted):
        raise UserError(
            f"{folder} was begun with {differ}: repeat it with the same, or start anew with --overwrite in place of --resume"
        )


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs between two jobs, in words; nothing where they are the same."""
    one, other = (json.loads(json.dumps(job)) for job in (one, other))
    differ = []
    for key in sorted(one.keys() | other.keys()):
        before, now = one.get(key), other.get(key)
        if before != now:
            names = _differing(before, now) if isinstance(before, dict) and isinstance(now, dict) else []
            differ.append(f"other {key} ({', '.join(names)})" if names else f"another {key}")
    return " and ".join(differ)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    names = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    more = len(names) - MOST_NAMED
    return [*names[:MOST_NAMED], f"and {more} more"] if more > 0 else names
