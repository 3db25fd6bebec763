"""A folded checkpoint as a model that can be trained, and back.

Checkpoints scale their parts for the engines (the latent of the `deepseek_v3` layout by 2⁻¹⁹), which no optimizer would
survive. So what is trained is the source's architecture with kvfold's designs in the place of its attention, whatever the
layout.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from kvfold.convert.layouts import Layout, layout_of
from kvfold.convert.layouts.kvfold import refuse_other
from kvfold.convert.layouts.source import within
from kvfold.convert.output.record import RECORD, read_record
from kvfold.convert.output.writer import CheckpointWriter
from kvfold.convert.planning.conversion_plan import ConversionPlan
from kvfold.convert.planning.plan import make_plan, settled
from kvfold.convert.planning.settings import ConvertSettings, parse_settings
from kvfold.convert.source.checkpoint import CheckpointReader, TensorSpec
from kvfold.convert.source.configfile import refuse_adapter
from kvfold.convert.source.fetch import fetch_config
from kvfold.convert.source.model import build_on_meta, fill_buffers
from kvfold.convert.source.stream import last_states, logit_cap
from kvfold.errors import UserError
from kvfold.recipes.losses import Objective
from kvfold.recipes.recipe import Recipe
from kvfold.surgery.designs import design, weights_of
from kvfold.surgery.kvfold_attention import Attention, attention_of, fold_in

if TYPE_CHECKING:
    from peft import PeftModel

LEAST_SCALE = 1e-3
"""Of a parameter's steps: what begins at zero has to move too."""


@dataclass(frozen=True)
class Folded:
    """A folded checkpoint: its tensors, what kvfold.json says of it, and the plan that it was made by."""

    reader: CheckpointReader
    record: dict[str, Any]
    source_config: dict[str, Any]
    plan: ConversionPlan

    @property
    def layout(self) -> Layout:
        return layout_of(self.plan)

    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the checkpoint's order."""
        specs = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in self.reader.entries.items()]
        return within(specs, self.reader, None) if self.plan.within else specs

    def attention(self, layer: int, meta: bool) -> nn.Module:
        """The design of a layer in float32."""
        names = self.layout.names(layer, self.plan)
        weights = self.layout.lift({name: self.reader.tensor(name, meta=meta) for name in names}, self.plan)
        return design(weights.to(torch.float32))

    def rest(self) -> Iterator[tuple[str, str, float]]:
        """What is not attention: its name here, its name in the source's architecture, and the factor on it here."""
        attention = {name for layer in self.plan.folded for name in self.layout.names(layer, self.plan)}
        for name in self.reader.entries:
            if name not in attention:
                origin, factor = self.layout.origin(name, self.plan)
                yield name, self.plan.family.called(origin), factor


def open_folded(folder: Path, source: str | None) -> Folded:
    """Read what `folder` is. The source's config is asked of `source` where kvfold.json does not hold it.

    Raises:
        UserError: no checkpoint, not one of kvfold's, an adapter, or of a version that folded otherwise.
    """
    refuse_adapter(folder)
    reader = CheckpointReader(folder)
    record = read_record(folder, "uptrain takes what `kvfold convert` wrote", "convert again")
    settings = parse_settings(ConvertSettings, record["settings"])
    config = record.get("source_config") or fetch_config(source or record["source"], settings.revision)
    recorded = record["target"]
    widths = recorded.get("widths") or ()
    if any(len(pair) != 2 for pair in widths):
        raise UserError(f"{folder / RECORD} is damaged (target.widths are no pairs): convert again")
    plan = make_plan(config, settings)
    if plan.measures_widths and plan.layout != "kvfold":  # one split for all layers, which the calibration text chose
        widths = [(recorded["kv_rank"], recorded["rope_dim"])]
    if widths:
        plan = settled(plan, config, tuple((rank, rope) for rank, rope in widths))
    folded = Folded(reader, record, config, plan)
    missing = [n for i in plan.folded for n in folded.layout.names(i, plan) if n not in reader.entries]
    target = json.loads(json.dumps(plan.target()))
    # the note is for people; a later version may word it otherwise, or record more
    same = all(recorded[key] == target.get(key) for key in recorded if key != "note")
    if missing or not same:
        raise UserError(f"{folder} holds another design than {RECORD} says: convert again with this version of kvfold")
    if plan.layout == "kvfold":
        refuse_other(reader.config, plan, folder / "config.json")
    return folded


class Student(nn.Module):
    """A causal language model whose forward pass gives the losses.

    The whole step lies in `forward`, so that what wraps a module (DDP, FSDP, DeepSpeed, autocast) finds it whole.
    """

    def __init__(self, causal: Any, objective: Objective) -> None:
        super().__init__()
        self.causal, self.objective = causal, objective
        self._no_split_modules = causal._no_split_modules  # what FSDP wraps one by one

    def forward(
        self, input_ids: Tensor, reference: Tensor | None = None, teacher_head: nn.Linear | None = None
    ) -> dict[str, Tensor]:
        """Token windows (B, T) and the teacher's last hidden states (B, T - 1, d') → `loss`, `kl` and `ce`."""
        hidden = last_states(self.causal, input_ids)
        return self.objective(hidden, self.causal.get_output_embeddings(), input_ids[:, 1:], reference, teacher_head)


@dataclass
class Trainee:
    """A student and how it learns.

    Attributes:
        student: parameters that learn have `requires_grad`, and are float32.
        adapters: peft's view of the same model, None without adapters.
        scales: root mean square of every parameter that learns, by name: the measure of its steps.
    """

    student: Student
    adapters: "PeftModel | None"
    scales: dict[str, float]

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put trained parameters in, by name."""
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(tensors[name])


def build(folded: Folded, recipe: Recipe, frozen: torch.dtype | None, meta: bool = False) -> Trainee:
    """The model that learns, on the CPU.

    Args:
        frozen: dtype of what is neither attention nor learns, None for the checkpoint's own.
        meta: shapes without numbers, which costs no memory.
    """
    if recipe.train == "full" and folded.plan.family.experts is not None:
        raise UserError("train=full is not possible where layers have experts: use train=attention or train=lora")
    causal: Any = build_on_meta(folded.source_config)
    base = causal.base_model
    for layer in folded.plan.folded:
        fold_in(base, layer, folded.attention(layer, meta), folded.plan.spec.positions(layer))
    fill_buffers(causal, "cpu")
    if folded.plan.family.experts is not None:
        _fill(causal, folded, frozen, meta)
    else:
        # A tensor that has two places in the checkpoint is taken from that without a factor.
        for name, origin, factor in sorted(folded.rest(), key=lambda entry: entry[2] == 1.0):
            tensor = folded.reader.tensor(name, meta=meta)
            value = (tensor.float() / factor).to(frozen or tensor.dtype)
            set_module_tensor_to_device(causal, origin, value.device, value=value, dtype=value.dtype)
    causal.tie_weights()
    causal.requires_grad_(False)

    adapters: PeftModel | None = None
    scales: dict[str, float] = {}
    if recipe.train == "lora":
        adapters, scales = _add_adapters(causal, recipe)
    if recipe.gradient_checkpointing:
        # transformers has renamed it and kept the settings
        enable = getattr(causal, "activation_checkpointing_enable", None) or causal.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    inside = designs(causal)
    for name, parameter in causal.named_parameters():
        if _learns_in_full(name, parameter, recipe, inside):
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
            scales[name] = max(_size(parameter), LEAST_SCALE)
    student = Student(causal, Objective(recipe.kl_weight, recipe.ce_weight, recipe.top_k, logit_cap(causal.config)))
    return Trainee(student, adapters, {f"causal.{name}": scale for name, scale in scales.items()})


def _fill(causal: Any, folded: Folded, frozen: torch.dtype | None, meta: bool) -> None:
    """Give a model with experts all that is not attention."""
    read = folded.plan.family.reading(folded.reader.entries, lambda name: folded.reader.tensor(name, meta=meta))
    inside = designs(causal)
    for name, _ in list(causal.named_parameters()):
        if not name.startswith(inside):
            value = read(name)
            value = value.to(frozen or value.dtype)
            set_module_tensor_to_device(causal, name, value.device, value=value, dtype=value.dtype)


def _size(tensor: Tensor) -> float:
    """Root mean square."""
    return 1.0 if tensor.is_meta else float(tensor.detach().square().mean().sqrt())


def designs(causal: nn.Module) -> tuple[str, ...]:
    """What the names of the new attention's parameters begin with, a prefix per layer."""
    return tuple(f"{name}." for name, module in causal.named_modules() if isinstance(module, Attention))


def projections(causal: nn.Module) -> dict[str, nn.Linear]:
    """The projections of the new attention, by name: every linear map inside a design."""
    inside = designs(causal)
    return {name: m for name, m in causal.named_modules() if name.startswith(inside) and isinstance(m, nn.Linear)}


def _adapted(linear: nn.Linear, rank: int) -> bool:
    """Whether an adapter of this rank is smaller than the matrix itself."""
    return rank * (linear.in_features + linear.out_features) < linear.weight.numel()


def _learns_in_full(name: str, parameter: nn.Parameter, recipe: Recipe, inside: tuple[str, ...]) -> bool:
    if recipe.train == "full":
        return True
    if name.startswith(inside):
        return not (".lora_" in name or name.endswith(".base_layer.weight"))
    return recipe.norms and parameter.ndim == 1


def _add_adapters(causal: nn.Module, recipe: Recipe) -> tuple["PeftModel | None", dict[str, float]]:
    """Low-rank adapters on the projections that one makes smaller, and the measure of their steps.

    The product B·A starts at zero. A's step is relative to A; B's is such that the product moves as the matrix itself
    would in full training.
    """
    from peft import LoraConfig, get_peft_model

    targets = {name: linear for name, linear in projections(causal).items() if _adapted(linear, recipe.lora_rank)}
    if not targets:
        return None, {}
    sizes = {name: _size(linear.weight) for name, linear in targets.items()}
    config = LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=list(targets))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # A begins at random, and a resumed run measures its steps by the same
        warnings.simplefilter("ignore", FutureWarning)  # peft asks the model by a name that transformers has given up
        adapters: Any = get_peft_model(causal, config)
    scales = {}
    for name, size in sizes.items():
        module: Any = causal.get_submodule(name)
        a = _size(module.lora_A["default"].weight)
        scales[f"{name}.lora_A.default.weight"] = a
        scales[f"{name}.lora_B.default.weight"] = size / (a * recipe.lora_rank**0.5)
    return adapters, scales


def write_folded(folded: Folded, causal: nn.Module, changed: Iterable[str], writer: CheckpointWriter) -> None:
    """Write a model without adapters in the layout that `folded` has. What did not learn is copied byte for byte.

    Args:
        causal: the model of `build`, adapters merged.
        changed: names of its parameters that learned.
    """
    modules: Any = causal
    learned = set(changed)
    for layer in folded.plan.folded:
        weights = weights_of(attention_of(modules.base_model.layers[layer]))
        for name, tensor in folded.layout.tensors(weights, layer, folded.plan).items():
            writer.write(name, tensor)
    for name, origin, factor in folded.rest():
        if origin in learned:
            tensor = causal.get_parameter(origin).detach()
            writer.write(name, tensor if factor == 1.0 else tensor.float() * factor)
        else:
            writer.copy(name, folded.reader)
    for name in folded.reader.beside:
        writer.copy(name, folded.reader)
