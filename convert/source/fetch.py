"""Where checkpoints come from: a local folder or a Hub id."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kvfold.convert.source.configfile import read_config
from kvfold.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Weights in formats that kvfold does not read stay on the Hub.
_IGNORED = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.ot", "*.onnx", "*.gguf", "original/*", "consolidated*"]


def fetch_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a local folder or a Hub id, without any weights. Raises UserError when it cannot be had."""
    if _is_here(source):
        return read_config(Path(source))
    _refuse_impossible(source)
    from huggingface_hub import hf_hub_download

    with _explained(source, revision):
        path = hf_hub_download(source, "config.json", revision=revision)
    return read_config(Path(path).parent)


def fetch_checkpoint(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded into the Hub's cache when `source` is no local folder.

    Raises UserError when it cannot be had.
    """
    if _is_here(source):
        return spelled(Path(source))
    _refuse_impossible(source)
    from huggingface_hub import snapshot_download

    with _explained(source, revision):
        return Path(snapshot_download(source, revision=revision, ignore_patterns=_IGNORED))


def spelled(folder: Path) -> Path:
    """The folder by a path that can be written in UTF-8: libraries that are not written in Python know no other."""
    try:
        str(folder).encode()
        return folder
    except UnicodeEncodeError:
        link = Path(tempfile.mkdtemp(prefix="kvfold-")) / "checkpoint"
        link.symlink_to(folder.resolve())
        atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
        return link


def _is_here(source: str) -> bool:
    """Whether this is a path; an empty one would be the folder in which the command runs."""
    return bool(source.strip()) and Path(source).exists()


def _refuse_impossible(source: str) -> None:
    if not _HUB_ID.fullmatch(source):
        raise UserError(f"{source or 'an empty name'} does not exist here and is no Hub id (user/name): check the path")


class _explained:
    """Turn the Hub client's errors into one line with a remedy."""

    def __init__(self, source: str, revision: str | None) -> None:
        self.what = source if revision is None else f"{source} at revision {revision}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            remedy = "it is gated: accept its licence on the Hub, then run `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            remedy = "no such folder here and no such repository on the Hub, or it is private (`hf auth login`)"
        elif isinstance(error, RevisionNotFoundError):
            remedy = "no such revision"
        elif isinstance(error, (OSError, RuntimeError, ValueError)):
            remedy = f"no such folder here, and the Hub did not answer ({type(error).__name__}): check the path or the network"
        else:
            return
        raise UserError(f"{self.what}: {remedy}") from None
