"""`OUT.partial`: the folder that a verb works in, held by one process at a time, until what it made is renamed to `OUT`."""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from safetensors import SafetensorError

from kvfold.convert.output.files import sync, write_whole
from kvfold.errors import ConversionError, UserError, explain

JOURNAL, RUN = "journal.jsonl", "run.json"
KINDS = {JOURNAL: "conversion", RUN: "uptraining"}
"""The file that says what was begun → what that is."""
LOCK, DONE, REPLACED = "kvfold.lock", "done", "replaced"


class Partial:
    """A context in which this process alone may write `OUT.partial`, which is made when it is not there.

    Leaving it by an exception keeps what was begun, but for a UserError in a run that began here: a request that cannot be
    carried out leaves nothing.

    Args:
        begun: the file whose presence says that there is something to go on with, JOURNAL or RUN.
        resume: go on with that.
        overwrite: replace `out`, and whatever was begun.

    Attributes:
        folder: `OUT.partial`.
        resumed: there is something to go on with, and it is wanted.
        finished: `out` was whole and had its name already; nothing is left to do.

    Raises:
        UserError: another process holds the folder, it is not kvfold's or holds something else that was begun, it cannot be
            written, or `out` or something begun exists and is neither to be replaced nor to be gone on with.
    """

    def __init__(self, out: Path, begun: str, resume: bool = False, overwrite: bool = False) -> None:
        self.out, self.begun, self.overwrite = out, begun, overwrite
        self.folder = partial_folder(out)
        self.resumed = self.finished = False
        if not (resume and (self.folder / begun).exists()):
            refuse_existing(out, overwrite)
        self._lock = self._hold()
        try:
            self._open(resume)
        except BaseException:
            self._leave()
            raise

    def _hold(self) -> IO[bytes]:
        """Lock a file in the folder, for as long as it is open."""
        while True:
            self._refuse_foreign()
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = (self.folder / LOCK).open("a+b", buffering=0)
            except FileNotFoundError:  # whoever held the folder has just removed it
                continue
            except OSError as error:
                raise UserError(f"{self.folder} cannot be written ({error.strerror}): choose another place") from None
            if not _lock(lock):
                holder = os.pread(lock.fileno(), 20, 0).decode(errors="replace") or "unknown"
                lock.close()
                raise UserError(
                    f"{self.folder} is being written by another kvfold, process {holder}: wait for it, or choose another name"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), (self.folder / LOCK).stat()):
                    lock.truncate(0)
                    lock.write(str(os.getpid()).encode())
                    return lock
            lock.close()  # what was locked has been removed meanwhile

    def _refuse_foreign(self) -> None:
        """Raise UserError when the folder is there and not one that kvfold made."""
        try:
            held = None if self.folder.is_symlink() else os.listdir(self.folder)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            held = None if os.path.lexists(self.folder) else []
        if held is None or (held and LOCK not in held):
            raise UserError(f"{self.folder} is in the way and none of kvfold's: move it, or choose another name")

    def _open(self, resume: bool) -> None:
        for file, kind in KINDS.items():
            if file != self.begun and self._holds(file):
                raise UserError(
                    f"{self.folder} holds an interrupted {kind}: finish that with --resume, remove the folder, "
                    "or choose another name"
                )
        if self._holds(REPLACED) and not self.out.exists():  # a kill between two renames
            os.rename(self.folder / REPLACED, self.out)
        self.resumed = resume and self._holds(self.begun)
        if self.resumed and self._has_its_name():
            self.finished = True
            self.discard()
            return
        refuse_existing(self.out, self.overwrite)  # again: whoever held the folder may have finished
        if self._holds(self.begun) and not resume and not self.overwrite:
            raise UserError(
                f"{self.folder} holds an interrupted {KINDS[self.begun]}: go on with --resume, or start anew with --overwrite"
            )
        if not self.resumed:
            remove(self.folder / self.begun)  # first: without it nothing else counts
            self._empty()

    def _holds(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)

    def give_name(self, made: Path) -> None:
        """Rename the folder `made`, which lies in this one, to `out`, and remove this one.

        At any time there is the old `out` or the new one, where the system can exchange two names in one step; where it
        cannot, the next call restores what a kill leaves. Raises ConversionError when `out` has appeared meanwhile and is not
        to be replaced.
        """
        try:
            refuse_existing(self.out, self.overwrite)
        except UserError as error:
            raise ConversionError(f"{error}; then repeat with --resume") from None
        for path in (made, *made.rglob("*")):
            sync(path)
        write_whole(self.folder / DONE, _identity(made))
        if not self.out.exists():
            os.rename(made, self.out)
        elif not exchange(made, self.out):
            os.rename(self.out, self.folder / REPLACED)
            try:
                os.rename(made, self.out)
            except OSError:
                os.rename(self.folder / REPLACED, self.out)
                raise
        sync(self.out.parent)
        self.discard()

    def _has_its_name(self) -> bool:
        done = self.folder / DONE
        return done.is_file() and self.out.is_dir() and done.read_text(errors="replace") == _identity(self.out)

    def _empty(self) -> None:
        """Remove all but the lock; last what says that it was begun and done."""
        last = [self.begun, DONE]
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
            if path.name != LOCK:
                remove(path)

    def discard(self) -> None:
        """Remove the folder and let it go."""
        self._empty()
        remove(self.folder / LOCK)
        with suppress(OSError):  # someone else has begun in it, in this moment
            self.folder.rmdir()
        self._lock.close()

    def _leave(self) -> None:
        """Let the folder go, and keep what was begun."""
        if self._lock.closed:
            return
        if any(self._holds(file) for file in KINDS):
            self._lock.close()
        else:
            self.discard()

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UserError) and not self.resumed and not self._lock.closed:
            self.discard()
        self._leave()


def partial_folder(out: Path) -> Path:
    if not out.name or out.name == "..":
        raise UserError(f"{out} names no folder to write: choose another name")
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise UserError when `out` exists and may not be replaced."""
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a link to nothing: remove it, or choose another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: choose another name, or pass --overwrite to replace it")
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise UserError(f"{out} is not a checkpoint folder: kvfold will not replace it; choose another name")


def exchange(one: Path, other: Path) -> bool:
    """Give each of two paths the other's name in one step; False where the system cannot."""
    at_cwd, flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2), which Python does not offer
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), flag) == 0


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Turn what the system refuses into a ConversionError that says so and how to go on."""
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{explain(error, folder)}; then repeat with --resume") from error
    except SafetensorError as error:  # which hides what the system said
        raise ConversionError(f"{folder}: {error}; check the disk, then repeat with --resume") from error
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        remedy = "free memory there and repeat with --resume, or begin again with a shorter window or on another device"
        raise ConversionError(f"{reason}: {remedy}") from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Make a file that no other process writes meanwhile, and remove it when something fails.

    Raises UserError when another one is writing it.
    """
    with path.open("ab") as file:
        if not _lock(file):
            raise UserError(f"{path} is being written by another kvfold: wait for it, or choose another name")
        try:
            yield
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _lock(file: IO[bytes]) -> bool:
    """Whether this process has the file now, until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _identity(folder: Path) -> str:
    """What a folder keeps when it is renamed."""
    found = folder.stat()
    return f"{found.st_dev} {found.st_ino}"


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
