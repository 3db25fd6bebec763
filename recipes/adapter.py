"""An uptraining kept as a PEFT adapter of the folded checkpoint, in that checkpoint's own names.

What was learned on kvfold's designs is carried over: a layout maps each projection linearly to a stored matrix, so the image of
a change of rank r has rank r again, and a singular value decomposition writes it as two factors.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from kvfold.errors import ConversionError, UserError
from kvfold.recipes.model import Folded, Trainee, designs
from kvfold.surgery.designs import weights_of
from kvfold.surgery.kvfold_attention import attention_of

NOISE = 1e-12
"""Singular values below this share of the largest are rounding: everything here is float64."""


def refuse_unadaptable(trainee: Trainee) -> None:
    """Raise UserError when something learns along that an adapter cannot hold: biases and other parameters of a design."""
    inside = designs(trainee.student)
    for name in trainee.trained():
        owner, _, last = name.rpartition(".")
        if name.startswith(inside) and not (last == "weight" and isinstance(trainee.student.get_submodule(owner), nn.Linear)):
            raise UserError(
                f"{name.removeprefix('causal.')} learns too, which an adapter cannot hold: leave --keep-adapter out"
            )


def write_adapter(folded: Folded, trainee: Trainee, base: str, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the checkpoint `base`, which `folded` was read from.

    Norms that learned are kept whole beside the factors. Raises ConversionError when the layout turns out not to be linear.
    """
    causal: Any = trainee.student.causal
    changes: dict[str, Tensor] = {}
    for layer in folded.plan.folded:
        changes |= _stored_change(folded, layer, attention_of(causal.base_model.layers[layer]))
    factors = {name: _factors(change) for name, change in changes.items()}
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors = {}
    for name, (a, b) in factors.items():
        module = name.removesuffix(".weight")
        missing = rank - a.shape[0]
        tensors[f"base_model.model.{module}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, missing)).float()
        tensors[f"base_model.model.{module}.lora_B.weight"] = nn.functional.pad(b, (0, missing)).float()
    learned = {name.removeprefix("causal.") for name in trainee.trained()}
    norms = {}
    for name, origin, factor in folded.rest():
        if origin in learned:
            norms[name.removesuffix(".weight")] = causal.get_parameter(origin).detach() * factor
    tensors |= {f"base_model.model.{module}.weight": tensor for module, tensor in norms.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[name.removesuffix(".weight") for name in factors],
        modules_to_save=list(norms) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def _stored_change(folded: Folded, layer: int, learned: nn.Module) -> dict[str, Tensor]:
    """What a layer's learned design adds to the stored matrices, by name, in float64; those without a change left out."""
    before: Any = folded.attention(layer, meta=False).double()
    change, after = copy.deepcopy(before), copy.deepcopy(before)
    for name, module in before.named_modules():
        if isinstance(module, nn.Linear):
            delta = _change(learned.get_submodule(name), module.weight.detach())
            change.get_submodule(name).weight.data = delta
            after.get_submodule(name).weight.data += delta
    stored = [folded.layout.tensors(weights_of(design), layer, folded.plan) for design in (before, change, after)]
    changes = {}
    for name, tensor in stored[1].items():
        if tensor.ndim != 2 or not tensor.any():
            continue
        if not torch.allclose(stored[0][name] + tensor, stored[2][name], rtol=1e-9, atol=1e-12):
            raise ConversionError(f"{name} does not change linearly, so no adapter can say it: leave --keep-adapter out")
        changes[name] = tensor
    return changes


def _change(module: Any, before: Tensor) -> Tensor:
    """B·A of a module with an adapter, the difference of one that learned in full."""
    if hasattr(module, "lora_A"):
        a, b = (part["default"].weight.detach().double() for part in (module.lora_A, module.lora_B))
        return b @ a * module.scaling["default"]
    return module.weight.detach().double() - before


def _factors(change: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) of rank r → A (r, m) and B (n, r) with B·A the change."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = int((s > NOISE * s[0]).sum())
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
