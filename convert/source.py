"""Where checkpoints come from: a local folder or a Hub id."""

import atexit
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.convert.checkpoint import CheckpointReader, TensorEntry, read_config, refuse_adapter
from kvfold.convert.config import config_of
from kvfold.convert.families import Family, family_of
from kvfold.convert.files import checksum, checksum_of, stamp
from kvfold.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
UNREAD_BUFFER = "rotary_emb.inv_freq"
"""What old checkpoints carry and every model computes anew."""
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


def build_on_meta(config: dict[str, Any]) -> "PreTrainedModel":
    """The model of a config.json with shapes and no numbers. Raises UserError when transformers cannot build it."""
    import torch
    from transformers import AutoModelForCausalLM

    read = config_of(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # of many kinds, by what stands in the config
        line = " ".join(str(error).split())
        raise UserError(f"transformers cannot build a model from config.json ({line}): check that file") from None


def fill_buffers(model: "PreTrainedModel", device: "torch.device | str") -> None:
    """Give a model that was built on the meta device what no checkpoint holds: frequencies, and scales of embeddings."""
    import torch

    for module in model.modules():
        unsaved = module._non_persistent_buffers_set & {name for name, held in module._buffers.items() if held is not None}
        for name in unsaved:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=device)
        if unsaved:
            model._init_weights(module)  # as transformers itself does where it loads a checkpoint


def open_source(folder: Path) -> CheckpointReader:
    """The checkpoint in `folder` as transformers loads it: its config says of the tensors what they are.

    A tied output embedding that is stored with other numbers is not tied; one that is stored alone is the embedding of both.
    The dtype is that of the tensors.

    Raises:
        UserError: as `CheckpointReader` and `refuse_mismatch`.
    """
    reader = CheckpointReader(folder)
    reader.config["dtype"] = str(reader.dtype).removeprefix("torch.")
    reader.config.pop("torch_dtype", None)
    model = build_on_meta(reader.config)
    embedding, head = model.base_model_prefix + ".embed_tokens.weight", "lm_head.weight"
    if model.config.tie_word_embeddings and head in reader.entries:
        if embedding not in reader.entries:
            reader.entries[embedding] = reader.entries.pop(head)
        elif not _same(reader, embedding, head):
            reader.config["tie_word_embeddings"] = False
            model = build_on_meta(reader.config)
    refuse_mismatch(reader, model, family_of(reader.config))
    return reader


def load_causal(folder: Path, **how: Any) -> tuple["PreTrainedModel", list[str]]:
    """The model in `folder` with its weights, by transformers' own classes and no code of the folder's; what it lacks, by name.

    Raises:
        UserError: it does not load, its weights are no safetensors, or an adapter beside them would be loaded in their place.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_adapter(folder)
    CheckpointReader(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **how
        )
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of many kinds, by what stands in the folder
        refuse_code(folder, error, "choose one that transformers has a class for")
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} does not load in transformers ({line}): check its config.json and weights") from None
    model, info = loaded
    return model, sorted(info["missing_keys"])


def refuse_code(folder: Path, error: Exception, remedy: str) -> None:
    """Raise UserError when `error` is transformers' wish to run code that lies in the folder, which kvfold never grants."""
    if "trust_remote_code" in str(error):
        raise UserError(f"{folder} loads by code of its own only (auto_map), and kvfold runs none: {remedy}") from None


def refuse_mismatch(reader: CheckpointReader, model: "PreTrainedModel", family: Family | None = None) -> None:
    """Raise UserError when the checkpoint lacks a tensor of its config's model, or holds one of another shape, one that is not
    floating-point, or one in the model's own layers that it has no place for."""
    wanted = set(dict(model.named_parameters(remove_duplicate=False)))
    for name, parameter in model.named_parameters():
        rows, each = [[name]] if family is None else family.stored_as(name, reader.entries), tuple(parameter.shape)
        if not rows or ".experts." in rows[0][0]:
            if len(rows) != each[0]:
                raise UserError(f"{reader.folder} holds {len(rows)} experts of {name}, and config.json means {each[0]}")
            each = (each[1] // len(rows[0]), *each[2:])
        for stored in (part for row in rows for part in row):
            wanted.add(stored)
            _refuse_entry(stored, reader.entry(stored), each)
    modules = (model.base_model_prefix + ".", "lm_head.")
    strange = [n for n in reader.entries if n.startswith(modules) and n not in wanted and not n.endswith(UNREAD_BUFFER)]
    if strange:
        raise UserError(
            f"{reader.folder} holds {strange[0]!r:.100}{f' and {len(strange) - 1} more' * (len(strange) > 1)}, for which a "
            f"{model.config.model_type} model of {model.config.num_hidden_layers} layers has no place: the model is another "
            "than config.json says"
        )


def _refuse_entry(name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
    """Raise UserError when a tensor is of another shape, or no floating-point one."""
    if entry.shape != shape:
        raise UserError(
            f"{name} in {entry.file} has shape {entry.shape}, but config.json means {shape}: "
            "weights and config are not of one model, download both again"
        )
    if not entry.dtype.is_floating_point:
        raise UserError(
            f"{name} in {entry.file} holds {str(entry.dtype).removeprefix('torch.')}, and weights are floating-point: "
            "start from the unquantised checkpoint"
        )


def _same(reader: CheckpointReader, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers."""
    first, second = reader.entry(one), reader.entry(other)
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return all(a == b for a, b in zip(reader.chunks(one), reader.chunks(other), strict=True))


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
