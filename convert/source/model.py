"""Models of transformers from a checkpoint: with shapes only, or with weights. No code of a checkpoint's runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.config import config_of
from kvfold.convert.source.configfile import refuse_adapter
from kvfold.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

UNREAD = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
"""What old checkpoints carry and every model computes anew: frequencies, and GPT-NeoX's masks."""


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


def load_causal(folder: Path, **how: Any) -> tuple["PreTrainedModel", list[str]]:
    """The model in `folder` with its weights, by transformers' own classes and no code of the folder's; what it lacks, by name.

    Raises:
        UserError: it does not load, its weights are no safetensors, its layers have tensors that its config does not mean, or
            an adapter beside them would be loaded in their place.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    from kvfold.convert.layouts.modeling_kvfold import damage

    refuse_adapter(folder)
    reader = CheckpointReader(folder)
    if reader.config.get("model_type") == "kvfold" and (reason := damage(reader.config)):
        raise UserError(f"{folder / 'config.json'} is damaged ({reason}): convert the source again, or get that file again")
    try:
        if reader.view is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **how
            )
        else:  # transformers has no class for what lies there, or one of more than the language model
            config = config_of(reader.config)
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded = model_class.from_pretrained(
                None,
                config=config,
                state_dict={name: reader.tensor(name) for name in reader.entries},
                output_loading_info=True,
                **how,
            )
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of many kinds, by what stands in the folder
        refuse_code(folder, error, "choose one that transformers has a class for")
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} does not load in transformers ({line}): check its config.json and weights") from None
    model, info = loaded
    if strange := sorted(n for n in info["unexpected_keys"] if ".layers." in n and not n.endswith(UNREAD)):
        raise UserError(
            f"{folder} holds {strange[0]!r:.100}, for which the model of its config.json has no place: weights and config are "
            "not of one model, get both again"
        )
    for name, module in model.named_modules():
        refuse_pairs(module, f"{folder}: {name}")
    return model, sorted(info["missing_keys"])


def refuse_pairs(module: Any, where: str) -> None:
    """Raise UserError when a folded attention turns by frequencies that its source has not."""
    pairs = getattr(module, "rope_pairs", None)
    if pairs is None or pairs.is_meta or not len(pairs):
        return
    if not 0 <= pairs.min() <= pairs.max() <= module.head_dim // 2:
        raise UserError(
            f"{where}.rope_pairs counts frequencies beyond the {module.head_dim // 2} of the source: convert it again"
        )


def refuse_code(folder: Path, error: Exception, remedy: str) -> None:
    """Raise UserError when `error` is transformers' wish to run code that lies in the folder, which kvfold never grants."""
    if "trust_remote_code" in str(error):
        raise UserError(f"{folder} loads by code of its own only (auto_map), and kvfold runs none: {remedy}") from None
