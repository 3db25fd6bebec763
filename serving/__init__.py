"""Folded checkpoints of our own layout in vLLM: a plugin of its group `vllm.general_plugins`.

    pip install 'kvfold[vllm]'
    vllm serve OUT

Every process of vLLM calls `register` when it starts. What is imported there is transformers and the two files of code that
travel with a checkpoint; vLLM's own modules follow when a folded checkpoint is opened.
"""


def register() -> None:
    """Tell transformers and vLLM of checkpoints whose `model_type` is `kvfold`. All else stays as it is."""
    from transformers import AutoConfig

    from kvfold.serving.checks import SERVED, ServedConfig, folded_architecture, installed, tested

    AutoConfig.register("kvfold", ServedConfig, exist_ok=True)
    if not tested(installed()):  # `ServedConfig` refuses, and only if it is asked
        return
    from vllm import ModelRegistry

    from kvfold.serving.options import check_options

    check_options()
    for family in SERVED:
        name = folded_architecture(family)
        ModelRegistry.register_model(name, f"kvfold.serving.model:{name}")
