"""A source opened: its tensors are those of its config's model, and what tells it from another one."""

from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.convert.families import Family, family_of
from kvfold.convert.output.files import checksum, checksum_of, stamp
from kvfold.convert.source.checkpoint import CheckpointReader, TensorEntry
from kvfold.convert.source.model import UNREAD, build_on_meta
from kvfold.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    names = {module: name for name, module in model.named_modules()}
    embedding, head = names[model.get_input_embeddings()] + ".weight", "lm_head.weight"
    if model.config.tie_word_embeddings and head in reader.entries:
        if embedding not in reader.entries:
            reader.entries[embedding] = reader.entries.pop(head)
        elif not _same(reader, embedding, head):
            reader.config["tie_word_embeddings"] = False
            model = build_on_meta(reader.config)
    refuse_mismatch(reader, model, family_of(reader.config))
    return reader


def refuse_mismatch(reader: CheckpointReader, model: "PreTrainedModel", family: Family | None = None) -> None:
    """Raise UserError when the checkpoint lacks a tensor of its config's model, or holds one of another shape, one that is not
    floating-point, or one in the model's own layers that it has no place for."""
    wanted = set(dict(model.named_parameters(remove_duplicate=False)))
    for name, parameter in model.named_parameters():
        rows, each = [[name]] if family is None else family.stored_as(name, reader.entries), tuple(parameter.shape)
        if family is not None and family.is_stacked(name, reader.entries):
            if len(rows) != each[0]:
                raise UserError(f"{reader.folder} holds {len(rows)} experts of {name}, and config.json means {each[0]}")
            each = (each[1] // len(rows[0]), *each[2:])
        for stored in (part for row in rows for part in row):
            wanted.add(stored)
            _refuse_entry(stored, reader.entry(stored), each)
    modules = (model.base_model_prefix + ".", "lm_head.") if reader.view is None else ("",)
    strange = [n for n in reader.entries if n.startswith(modules) and n not in wanted and not n.endswith(UNREAD)]
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


def identity(reader: CheckpointReader, times: bool = True) -> dict[str, str]:
    """What tells without reading the weights whether a checkpoint is still the same.

    config.json by its content, and every weight file by its size, its time and the content of its header; without `times` its
    copy is the same.
    """
    found = {"config.json": checksum(reader.folder / "config.json")}
    for path in sorted({entry.file for entry in (*reader.entries.values(), *reader.beside.values())}):
        with path.open("rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            found[path.name] = f"{stamp(path) if times else path.stat().st_size} {checksum_of(file, 0, header)}"
    return found
