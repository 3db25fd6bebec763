"""Where checkpoints come from: a local folder or a Hub id."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.convert.checkpoint import CheckpointReader, read_config
from kvfold.convert.files import checksum, checksum_of, stamp
from kvfold.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Weights in formats that kvfold does not read stay on the Hub.
_IGNORED = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.ot", "*.onnx", "*.gguf", "original/*", "consolidated*"]


def fetch_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a local folder or a Hub id, without any weights. Raises UserError when it cannot be had."""
    if Path(source).exists():
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
    if Path(source).exists():
        return Path(source)
    _refuse_impossible(source)
    from huggingface_hub import snapshot_download

    with _explained(source, revision):
        return Path(snapshot_download(source, revision=revision, ignore_patterns=_IGNORED))


def build_on_meta(config: dict[str, Any]) -> "PreTrainedModel":
    """The model of a config.json with shapes and no numbers. Raises UserError when transformers cannot build it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(config["model_type"], **rest), attn_implementation="sdpa", dtype=torch.float32
            )
    except Exception as error:  # config checks of many kinds, from transformers and the Hub's client alike
        line = " ".join(str(error).split())
        raise UserError(f"transformers cannot build a model from config.json ({line}): check that file") from None


def refuse_mismatch(reader: CheckpointReader) -> None:
    """Raise UserError when the checkpoint lacks a tensor that its config means, or holds one of another shape."""
    for name, parameter in build_on_meta(reader.config).named_parameters():
        entry = reader.entry(name)
        if entry.shape != tuple(parameter.shape):
            raise UserError(
                f"{name} in {entry.file} has shape {entry.shape}, but config.json means {tuple(parameter.shape)}: "
                "weights and config are not of one model, download both again"
            )


def identity(reader: CheckpointReader) -> dict[str, str]:
    """What tells without reading the weights whether a checkpoint is still the same.

    config.json by its content, and every weight file by its size, its time and the content of its header.
    """
    found = {"config.json": checksum(reader.folder / "config.json")}
    for path in sorted({entry.file for entry in reader.entries.values()}):
        first = min(entry.start for entry in reader.entries.values() if entry.file == path)
        with path.open("rb") as file:
            found[path.name] = f"{stamp(path)} {checksum_of(file, 0, first)}"
    return found


def _refuse_impossible(source: str) -> None:
    if not _HUB_ID.fullmatch(source):
        raise UserError(f"{source} does not exist here and is no Hub id (user/name): check the path")


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
