"""What a folded model's layers do and what its cache holds, measured on the running model."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def attention_errors(source: Any, model: Any, ids: Tensor) -> list[float]:
    """Per layer, `‖ŷ − y‖² / ‖y‖²` of the attention output when both models read the source's own inputs.

    Args:
        source, model: causal language models of transformers with as many layers.
        ids: tokens (B, T).
    """
    errors: list[float] = []
    layers = source.base_model.layers

    def compare(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        hidden, wanted = kwargs["hidden_states"], output[0]
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rope = model.base_model.rotary_emb(hidden, positions)
        forward = model.base_model.layers[len(errors)].self_attn.forward  # no hooks: both may be the same model
        got = forward(hidden_states=hidden, position_embeddings=rope, attention_mask=kwargs.get("attention_mask"))[0]
        energy = wanted.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny)  # zero in a layer that was pruned
        errors.append(float((got - wanted).double().square().sum() / energy))

    hooks = [layer.self_attn.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        source.base_model(ids.to(source.device), use_cache=False)
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
