"""Models whose attention was folded by kvfold, for transformers: the source's own class with other attention in some layers.

This file and kvfold_attention.py need torch and transformers alone. They travel with every checkpoint of the `kvfold` layout,
which loads by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or without that flag where kvfold is
imported.

A config is the source's, with `source_model_type` and, in `folded_layers`, what attention each layer has: the name of a design
in kvfold_attention.py with its widths, or null where a layer stays as it is. Tensors outside of attention keep their names.
"""

import inspect
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any, get_args

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

try:
    from .kvfold_attention import DESIGNS, POSITIONS, FoldedAttention, fold_in
except ImportError:  # inside kvfold, where it has another home
    from kvfold.surgery.kvfold_attention import DESIGNS, POSITIONS, FoldedAttention, fold_in

MOST = 10**6
"""No width of a model is larger; what is would only fill the memory."""
NORM = {"kv_heads": int, "together": bool, "eps": float, "behind": bool | None}
"""What a layer says of its norm of queries and keys."""
CODE = {"AutoConfig": "modeling_kvfold.KvfoldConfig", "AutoModelForCausalLM": "modeling_kvfold.KvfoldForCausalLM"}


class KvfoldConfig(PreTrainedConfig):
    """What a config.json of model type `kvfold` is read by: it becomes a `FoldedConfig` and the source's own class."""

    model_type = "kvfold"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises: ValueError, naming the field that no attention can be made of."""
        if reason := damage(config_dict):
            raise ValueError(f"config.json is damaged ({reason}): convert the source again, or get that file again")
        return classes(config_dict["source_model_type"])[0].from_dict(config_dict, **kwargs)


def damage(config: dict[str, Any]) -> str | None:
    """What in a config.json of model type `kvfold` no attention can be made of, by its field; None if all is well."""
    source, layers = config.get("source_model_type"), config.get("folded_layers")
    if not isinstance(source, str) or source not in CONFIG_MAPPING or CONFIG_MAPPING[source] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"source_model_type is {source!r:.40}, which is no language model of transformers"
    count = config.get("num_hidden_layers")
    if not isinstance(layers, list) or len(layers) != count:
        return f"folded_layers is no list of {count!r:.40} layers"
    reasons = (_damage_of_layer(layer) for layer in layers)
    return next((f"folded_layers[{number}]{reason}" for number, reason in enumerate(reasons) if reason), None)


def _damage_of_layer(widths: Any) -> str | None:
    """The same of one layer, from the name of the field on."""
    if widths is None:
        return None
    design = widths.get("design") if isinstance(widths, dict) else None
    if not isinstance(design, str) or design not in DESIGNS:
        return f".design is {design!r:.40}, and there are {', '.join(DESIGNS)}"
    taken, norm = taken_by(design), widths.get("norm")
    for name in sorted(widths.keys() - taken.keys() - {"design", "positions"}):
        return f".{name} is nothing that {design} takes"
    for name, parameter in taken.items():
        if name not in widths and parameter.default is parameter.empty:
            return f".{name} is missing"
        if name in widths and (wrong := _unlike(widths[name], parameter.annotation)):
            return f".{name} is {widths[name]!r:.40}, {wrong}"
    for name, kind in NORM.items() if norm is not None else ():
        if wrong := _unlike(norm.get(name), kind):
            return f".norm.{name} is {norm.get(name)!r:.40}, {wrong}"
    if (positions := widths.get("positions", POSITIONS[0])) not in POSITIONS:
        return f".positions is {positions!r:.40}, and there are {', '.join(POSITIONS)}"
    for name in (name for name in taken if name.endswith("_dim") and widths[name] % 2):
        return f".{name} is {widths[name]}, an odd width"
    heads, groups = widths["heads"], {widths.get("kv_heads"), (norm or {}).get("kv_heads")}
    if any(heads % group for group in groups if group):
        return f".heads is {heads}, which its kv_heads do not divide"
    return ".cap is 0, which nothing is divided by" if widths.get("cap") == 0 else None


@cache
def taken_by(design: str) -> dict[str, inspect.Parameter]:
    """What a design is made with, beside the hidden size."""
    shared = inspect.signature(FoldedAttention.__init__).parameters.values()
    own = inspect.signature(DESIGNS[design].__init__).parameters.values()
    named = [p for p in shared if p.default is not p.empty] + [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {p.name: p for p in named if p.name not in ("self", "hidden")}


def _unlike(value: Any, kind: Any) -> str:
    """What a value of a kind has to be, where it is not; the kinds are those of the designs' parameters."""
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in kinds:
        return ""
    if int in kinds:
        return "" if type(value) is int and 0 <= value <= MOST else "and has to be a width"
    if bool in kinds:
        return "" if isinstance(value, bool) else "and has to be true or false"
    if float in kinds:
        fits = type(value) in (int, float) and 0 <= value < math.inf
        return "" if fits else "and has to be a number that is not negative"
    return "" if isinstance(value, dict) else "and has to be an object in braces"


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
