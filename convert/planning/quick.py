"""Reading a config.json without torch, which is most of what importing transformers takes.

transformers' config classes work without torch, and then leave a few checks out: whether the activation exists, whether the
dtype does, and its RoPE's frequencies cannot be computed. A config that says the usual in all three reads the same either way.
Most of what is left is transformers' own start: it reads its 3,000 files, twice, to list what they hold.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from typing import Any

from kvfold.convert.families import FAMILIES
from kvfold.convert.planning.parameters import GATED
from kvfold.convert.planning.settings import DTYPE_BYTES
from kvfold.convert.source.config import ACTIVATIONS, KERNELS, plain_rope

LISTING = ("transformers", "transformers.models")
"""The packages that list what they hold."""


def hide_torch(config: dict[str, Any]) -> None:
    """Let this process import transformers' config classes without torch, where reading this config.json needs none.

    For a process that plans and ends: torch cannot be imported in it any more, nor anything from `transformers` itself.
    """
    if not {"torch", "transformers"} & set(sys.modules) and needs_no_torch(config):
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that there is no torch
        sys.modules["torch"] = None  # type: ignore[assignment]
        _leave_listing_out()


def _leave_listing_out() -> None:
    """Import transformers' config classes with the packages above them as plain folders."""
    try:
        for name in LISTING:
            spec = find_spec(name)
            assert spec is not None
            sys.modules[name] = module_from_spec(spec)
        sys.modules["transformers"].__version__ = version("transformers")  # type: ignore[attr-defined]
        import_module("transformers.models.auto.configuration_auto")
    except Exception:  # a version that needs its packages whole gets them
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


def needs_no_torch(config: dict[str, Any]) -> bool:
    """Whether a plan from this config.json is the same without torch, its refusals included."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        return True  # refused by its name
    acts = [config[key] for key in ("hidden_act", "hidden_activation") if config.get(key) is not None]
    kinds = [config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None]
    ropes = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key) is not None]
    return (
        name in GATED
        and all(isinstance(act, str) and act in ACTIVATIONS for act in acts)
        and all(isinstance(kind, str) and kind in DTYPE_BYTES for kind in kinds)
        and len(ropes) < 2
        and all(_plain_rope(told, config) for told in ropes)
        and not any("implementation" in key for key in config if key not in (*KERNELS, "cache_implementation"))
    )


def _plain_rope(told: Any, config: dict[str, Any]) -> bool:
    beside: dict[str, Any] = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    flat = isinstance(told, dict) and not any(isinstance(value, (dict, list)) for value in told.values())
    return flat and plain_rope({"rope_theta": 1e4, **beside, **told})
