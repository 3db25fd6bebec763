"""What a folded model's layers do and what its cache holds, measured on the running model."""

from typing import Any

import torch
from torch import Tensor

from kvfold.convert.source.stream import layer_calls
from kvfold.surgery.kvfold_attention import attention_of


@torch.no_grad()
def attention_errors(source: Any, model: Any, ids: Tensor) -> list[float]:
    """Per layer, `‖ŷ − y‖² / ‖y‖²` of the attention output when both models read the source's own inputs.

    Args:
        source, model: causal language models of transformers with as many layers.
        ids: tokens (B, T).
    """
    errors: list[float] = []
    rows = ids.to(source.device)
    calls = layer_calls(model.base_model, input_ids=rows)

    def compare(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        hidden, wanted = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0]
        attention = attention_of(model.base_model.layers[len(errors)])
        # no hooks: both may be the same model
        got = attention.forward(hidden_states=hidden, **calls[len(errors)][1])[0]
        energy = wanted.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny)  # zero in a layer that was pruned
        errors.append(float((got - wanted).double().square().sum() / energy))

    hooks = [attention_of(layer).register_forward_hook(compare, with_kwargs=True) for layer in source.base_model.layers]
    try:
        source.base_model(rows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


@torch.no_grad()
def measure_cache(model: Any, ids: Tensor, new_tokens: int = 8) -> tuple[float, float]:
    """Generate after the prompt `ids` (1, T) and count what the cache holds then.

    Returns:
        Cached numbers per token per layer, and bytes per token over all layers.
    """
    prompt = ids.to(model.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    cache = out.past_key_values
    tensors = cached_tensors(cache)
    tokens = cache.get_seq_length()  # the last new token has not been read, so it is not cached
    numbers = sum(t.numel() for t in tensors) / tokens / len(cache.layers)
    return numbers, sum(t.nbytes for t in tensors) / tokens


def cached_tensors(cache: Any) -> list[Tensor]:
    """All that a cache of transformers holds per token, keys, values and latents alike."""
    return [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor) and t.ndim >= 3]
