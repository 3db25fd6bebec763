"""A config.json and its tensors read as those of a known family: translated from another name, or taken out of a larger model.

`translations.py` and `wrappers.py` say what is what, as data.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvfold.convert.families.known import FAMILIES
from kvfold.convert.families.translated_experts import EXPERTS
from kvfold.convert.families.translated_gpt import GPT
from kvfold.convert.families.translation import DEFAULTS, SHARED, Cut, Cuts, Translation
from kvfold.convert.families.translations import TRANSLATIONS
from kvfold.convert.families.wrappers import LANGUAGE, PARTS, TEXT_TYPES, WRAPPERS, Wrapper
from kvfold.errors import UserError

RENAMED = (*TRANSLATIONS, *GPT, *EXPERTS)
"""Families under other names."""
TRANSLATED, PART_OF, WHOLE = "translated_from", "part_of", "whole_can_stay"
"""Keys of a config that was read so: the `model_type` that it had, that of what it is a part of, and whether that can be
written whole."""


@dataclass(frozen=True)
class View:
    """How a checkpoint is read.

    Attributes:
        config: config.json as that of the family.
        raw: config.json as it is.
        names, cuts: see `Translation`.
        prefixes: what the names of a part's tensors begin with → what they begin with by themselves; the others lie beside.
    """

    config: dict[str, Any]
    raw: dict[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=dict)
    prefixes: Mapping[str, str] = field(default_factory=dict)

    def made_of(self, name: str) -> dict[str, Cut | None] | None:
        """The family's tensors that are made of a stored one, and how (None: as it is); None when it lies beside."""
        if self.prefixes:
            begins = next((before for before in self.prefixes if name.startswith(before)), None)
            if begins is None:
                return None
            name = self.prefixes[begins] + name.removeprefix(begins)
        for theirs, ours in self.names.items():
            name = _between_dots(theirs).sub(ours, name)
        for part, made in self.cuts.items():
            if match := _between_dots(part).search(name):
                return {name[: match.start()] + ours + name[match.end() :]: cut for ours, cut in made.items()}
        return {name: None}

    def whole(self, folded: dict[str, Any]) -> dict[str, Any]:
        """config.json of the whole model with its language model folded, which by itself has the config `folded`."""
        raw, text = _without_code(self.raw), WRAPPERS[self.raw["model_type"]].text
        if text not in raw:
            return _changed(raw, folded, ("num_key_value_heads", "dtype", "tie_word_embeddings"))
        nested = _changed(raw[text], folded, ("num_key_value_heads", "dtype"))
        return {**_changed(raw, folded, ("dtype", "tie_word_embeddings")), text: nested}


def _changed(config: dict[str, Any], folded: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A config with some keys as in another one, and no dtype under its old name."""
    old = ("torch_dtype",) if "dtype" in folded else ()
    return {**{k: v for k, v in config.items() if k not in old}, **{k: folded[k] for k in keys if k in folded}}


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config and those of its parts without the classes that they name in files or repositories of others."""
    parts = {key: _without_code(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in parts.items() if key != "auto_map"}


_LANGUAGE_HEADS = ("ForConditionalGeneration", "ForCausalLM", "ChatModel", "MultiModalityCausalLM")
"""What the classes of models that write text end with."""


def _between_dots(part: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^.]){re.escape(part)}(?![^.])")


def view_of(config: dict[str, Any]) -> View | None:
    """How the checkpoint of a config.json is read, None as it is.

    Raises UserError when the family that it is cannot say what it says.
    """
    kind = config.get("model_type")
    for each in (*RENAMED, *PARTS):
        if each.model_type == kind and each.when(config):
            return _translated(config, each)
    wrapper = WRAPPERS.get(kind) if isinstance(kind, str) else None
    return None if wrapper is None else _taken_out(config, wrapper)


def read_as(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json as that of the family that it is or has in it. Raises UserError as `view_of`."""
    view = view_of(config)
    return config if view is None else view.config


def _translated(config: dict[str, Any], translation: Translation) -> View:
    named = config.get("architectures")
    ours, theirs = FAMILIES[translation.into].architecture, (translation.architecture, *translation.also)
    try:
        shared = {key: config[key] for key in SHARED if config.get(key) is not None}
        keys = {**DEFAULTS, **shared, **translation.keys(config)}
        keys = {"num_key_value_heads": keys["num_attention_heads"], **keys}
        if "rope_parameters" in keys:  # they say all
            keys = {key: value for key, value in keys.items() if key not in ("rope_theta", "rope_scaling")}
        cuts = translation.cuts(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(
            f"config.json is no complete {translation.model_type} config ({type(error).__name__}: {error}): check that file"
        ) from None
    read = {
        **keys,
        "model_type": translation.into,
        # another head on the same layers is refused by its name, as everywhere
        "architectures": [ours] if not named or (isinstance(named, list) and named[0] in theirs) else named,
        TRANSLATED: translation.model_type,
    }
    if translation.part_of:
        read |= {PART_OF: translation.model_type, WHOLE: False}
    return View(read, config, translation.names, cuts)


def _taken_out(config: dict[str, Any], wrapper: Wrapper) -> View | None:
    nested = config.get(wrapper.text)
    left = ("architectures", "auto_map", "vision_config", "audio_config")
    inner = {k: v for k, v in (nested if isinstance(nested, dict) else config).items() if k not in left}
    kind = str(inner.get("model_type") or wrapper.inner)
    inner["model_type"] = kind = wrapper.renamed.get(kind) or TEXT_TYPES.get(kind, kind)
    theirs = f"{wrapper.model_type}_text"
    inner = {**_defaults(theirs if theirs in TEXT_TYPES else kind, kind, inner), **inner}
    if kind in WRAPPERS or not isinstance(nested, dict | None):
        raise UserError(f"config.json: {wrapper.text} is {nested!r:.60}, which is no language model's config: check that file")
    for key in ("tie_word_embeddings", "quantization_config", "compression_config"):
        if config.get(key) is not None:
            inner[key] = config[key]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(inner.get(key), dict):
            inner[key] = _in_one_direction(inner[key])
    view = view_of(inner)
    if view is None and kind not in FAMILIES:
        return None
    if view is None:
        view = View({**inner, "architectures": [FAMILIES[kind].architecture]}, config)
    named = config.get("architectures")
    if isinstance(named, list) and named and not str(named[0]).endswith(_LANGUAGE_HEADS):
        view.config["architectures"] = named  # refused by its name, as everywhere
    stays = wrapper.stays and not view.names and not view.cuts
    return View({**view.config, PART_OF: config["model_type"], WHOLE: stays}, config, view.names, view.cuts, LANGUAGE)


def _defaults(theirs: str, kind: str, inner: dict[str, Any]) -> dict[str, Any]:
    """What a language model's config leaves to the class `theirs`, by which transformers reads it within the larger model.

    That is the sizes that kvfold reads before it asks the class of `kind`, and all else that this class means otherwise.
    """
    wanted: tuple[str, ...] = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    if theirs != kind:
        wanted += ("intermediate_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    missing = [key for key in wanted if key not in inner]
    ropes = [inner, *(inner[key] for key in ("rope_scaling", "rope_parameters") if isinstance(inner.get(key), dict))]
    turns = theirs == kind or any("rope_theta" in rope for rope in ropes)
    if kind not in FAMILIES or (not missing and turns):
        return {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    read = CONFIG_MAPPING[theirs]
    return {key: getattr(read, key) for key in missing} | ({} if turns else {"rope_theta": read.default_theta})


def _in_one_direction(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE on text of one that has three directions."""
    left = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
    for key in ("type", "rope_type"):
        if left.get(key) == "mrope":
            left[key] = "default"
    return left
