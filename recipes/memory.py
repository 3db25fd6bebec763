"""What an uptraining needs of memory, before it begins."""

import psutil
import torch

from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.errors import UserError
from kvfold.recipes.model import Trainee
from kvfold.recipes.recipe import Recipe
from kvfold.surgery.output import PIECE_BYTES

PIECE_COPIES = 6
"""Of the logits of one piece: both models', their log-probabilities and the gradient."""


def activation_bytes(plan: ConversionPlan, intermediate: int, recipe: Recipe, window: int, cpu: bool) -> int:
    """Activations kept for the backward pass of one forward pass, roughly.

    A layer keeps for each token its input, both norms' and the attention's and MLP's intermediate results, as in 2205.05198;
    where the attention is written out, on the CPU, its scores too.
    """
    spec, width = plan.spec, 2 if recipe.bf16 else 4
    layer = 8 * spec.hidden_size * 4 + (6 * spec.heads * spec.head_dim + 4 * intermediate) * width
    if cpu:
        layer += spec.heads * window * 3 * width
    kept = spec.layers * spec.hidden_size * 4 + layer if recipe.gradient_checkpointing else spec.layers * layer
    return recipe.micro_batch * window * kept


def needed_bytes(
    trainee: Trainee, teacher: int, plan: ConversionPlan, recipe: Recipe, window: int, cpu: bool
) -> dict[str, int]:
    """What each part takes on a device that holds everything; `teacher` are the bytes of its weights."""
    intermediate = trainee.student.causal.config.intermediate_size
    logits = min(PIECE_BYTES, recipe.micro_batch * window * plan.spec.vocab_size * 4)
    return {
        "student": sum(p.nbytes for p in trainee.student.parameters()),
        "teacher": teacher,
        "gradients and Adam": 3 * sum(p.nbytes for p in trainee.trained().values()),
        "activations": activation_bytes(plan, intermediate, recipe, window, cpu),
        "logits": PIECE_COPIES * logits,
    }


def refuse_too_little(parts: dict[str, int], device: torch.device, processes: int) -> None:
    """Raise UserError when the parts exceed what is free on the device, which `processes` share if it is the CPU."""
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available // processes
    if (need := sum(parts.values())) > free:
        each = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        raise UserError(
            f"uptraining needs about {need / 2**30:.2f} GiB on {device} ({each}) and {free / 2**30:.2f} are free: "
            "lower micro_batch or window, set gradient_checkpointing=true, or take train=lora"
        )
