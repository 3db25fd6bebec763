"""Models whose attention was folded by kvfold, for transformers: the source's own class with other attention in some layers.

This file and kvfold_attention.py need torch and transformers alone. They travel with every checkpoint of the `kvfold` layout,
which loads by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or without that flag where kvfold is
imported.

A config is the source's, with `source_model_type` and, in `folded_layers`, what attention each layer has: the name of a design
in kvfold_attention.py with its widths, or null where a layer stays as it is. Tensors outside of attention keep their names.
"""

import inspect
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

try:
    from .kvfold_attention import DESIGNS, fold_in
except ImportError:  # inside kvfold, where it has another home
    from kvfold.surgery.kvfold_attention import DESIGNS, fold_in

CODE = {"AutoConfig": "modeling_kvfold.KvfoldConfig", "AutoModelForCausalLM": "modeling_kvfold.KvfoldForCausalLM"}


class KvfoldConfig(PreTrainedConfig):
    """What a config.json of model type `kvfold` is read by: it becomes a `FoldedConfig` and the source's own class."""

    model_type = "kvfold"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return classes(config_dict["source_model_type"])[0].from_dict(config_dict, **kwargs)


class FoldedConfig:
    """What is added to the source's config class."""

    base_model_tp_plan: dict[str, str] = {}  # noqa: RUF012

    def __reduce__(self) -> tuple[Any, ...]:
        return blank, (self.source_model_type,), self.__dict__  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": dict(CODE)}  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """With the two files of code, so that what is saved again loads again."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for part in (FoldedConfig, fold_in):
            shutil.copy(inspect.getfile(part), save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


class KvfoldForCausalLM:
    """What is added to the source's model class."""

    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        base: Any = self.base_model  # type: ignore[attr-defined]
        for number, widths in enumerate(config.folded_layers):
            if widths is None:
                continue
            shape = {name: value for name, value in widths.items() if name not in ("design", "positions")}
            attention = DESIGNS[widths["design"]](config.hidden_size, **shape)
            fold_in(base, number, attention, widths.get("positions", "halves"))


@cache
def classes(source: str) -> tuple[Any, Any]:
    """The config and the model class of folded models of a source's model type, registered with transformers."""
    ours = {"model_type": "kvfold", "source_model_type": source, "folded_layers": None, "__module__": __name__}
    config = type("KvfoldConfig", (FoldedConfig, CONFIG_MAPPING[source]), ours)
    theirs: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[source]]
    name = "KvfoldForCausalLM"
    stored = get_checkpoint_conversion_mapping(source) or get_checkpoint_conversion_mapping(theirs.__name__)
    if stored:  # experts lie on the disk one by one, or names differ there: transformers finds how by the name of the class
        name = f"Kvfold{theirs.__name__}"
        register_checkpoint_conversion_mapping(name, stored, overwrite=True)
    model = type(name, (KvfoldForCausalLM, theirs), {"config_class": config, "__module__": __name__})
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    return config, model


def blank(source: str) -> Any:
    """A config without values, which pickle fills: its class is made at run time and has no name to be found by."""
    config = classes(source)[0]
    return config.__new__(config)


AutoConfig.register("kvfold", KvfoldConfig, exist_ok=True)
