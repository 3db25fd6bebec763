"""config.json of a folder, and what stands in its way."""

from pathlib import Path
from typing import Any

from kvfold.convert.families.views import read_as
from kvfold.convert.source.jsonfile import read_json
from kvfold.errors import UserError


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a local checkpoint, as that of the family that it is or has in it.

    Raises UserError when there is none, it is not JSON, the folder is an adapter's, or no family can say what it says.
    """
    return read_as(raw_config(folder))


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it is, with what other files say of a quantisation."""
    if not (folder / "config.json").exists():
        refuse_adapter(folder)
        raise UserError(f"{folder} has no config.json: give the folder of a Hugging Face checkpoint or a Hub id")
    for path in folder.iterdir():  # whoever opens one waits for ever, and transformers opens many
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is a pipe or a device, no file: remove it")
    config = read_json(folder / "config.json")
    if (folder / "hf_quant_config.json").exists():  # where modelopt says it
        config.setdefault("quantization_config", {"quant_method": "modelopt"})
    return config


def refuse_adapter(folder: Path) -> None:
    """Raise UserError when the folder is a PEFT adapter's, which has no weights of its own."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} is an adapter, not a checkpoint: merge it first "
            "(AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW); where kvfold folded the "
            "base, copy its kvfold.json too)"
        )
