"""What serving engines take: shapes of their kernels, and what stock architectures cannot say."""

from dataclasses import dataclass
from typing import Any

from kvfold.convert.families import AttentionSpec
from kvfold.convert.planning.settings import ConvertSettings


@dataclass(frozen=True)
class LatentShape:
    """Widths of latent attention as a checkpoint stores them: latent, rotary key, rest of a key, value."""

    rank: int
    rope: int
    nope: int
    value: int


VLLM_TOTALS = {"vllm": (320, 512, 576), "vllm-cpu": (576,)}
"""Latent + rotary key for which vLLM has decoding kernels, on CUDA and on CPU."""
VLLM_HEADS = ((64, 64, 128), (128, 64, 128), (192, 64, 256))
"""(nope, rope, value) for which it has prefill kernels on CUDA."""


def padded_shape(shape: LatentShape, pad_for: str | None) -> tuple[LatentShape, str]:
    """Zero-pad to a shape that vLLM's kernels take, and say in a line what came of it.

    By default only where the cache does not grow; with `vllm` or `vllm-cpu` whatever it costs, with `none` never. A
    shape that no padding makes legal comes back as it is.
    """
    heads = next((h for h in VLLM_HEADS if shape.nope <= h[0] and shape.rope <= h[1] and shape.value <= h[2]), None)
    totals = VLLM_TOTALS["vllm-cpu" if pad_for == "vllm-cpu" else "vllm"]
    total = next((t for t in totals if heads and shape.rank + heads[1] <= t), None)
    if heads is None or total is None:
        return shape, f"no vLLM kernel takes latent {shape.rank} + {shape.rope} with heads of {shape.nope}"
    padded = LatentShape(total - heads[1], heads[1], heads[0], heads[2])
    grown = total - shape.rank - shape.rope
    if pad_for == "none" or (pad_for is None and grown):
        return shape, f"not padded for vLLM's kernels; --pad-for vllm would cache {total} numbers per token per layer"
    return padded, f"padded for vLLM's kernels, {grown} cached numbers of zeros"


STEP3_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head widths of vLLM's attention on CPU; those on CUDA are among them or between."""


def padded_key(width: int, pad_for: str | None) -> tuple[LatentShape, str]:
    """MFA's one key and one value, zero-padded to a head width of vLLM's unless `pad_for` is `none`."""
    stored = width if pad_for == "none" else next(w for w in STEP3_WIDTHS if w >= width)
    note = f"padded for vLLM's kernels, {2 * (stored - width)} cached numbers of zeros"
    return LatentShape(stored, stored, 0, stored), note + "; transformers has no class for step3_text, vLLM has"


def step3_text_obstacles(said: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings, width: int) -> list[str]:
    """What the stock step3_text architecture cannot say of this conversion, each in a line."""
    found = {
        f"step3_text is mfa, not {settings.to}": settings.to != "mfa",
        "its queries and keys go through norms, which step3_text lacks": bool(spec.key_norm),
        "the source has attention biases, which step3_text lacks": spec.qkv_bias or spec.o_bias,
        f"rope type {spec.rope.type} depends on the head width, which changes": spec.rope.type
        not in ("default", "llama3", "linear"),
        f"a key wider than {spec.head_dim} repeats frequencies, which step3_text's grid cannot": width > spec.head_dim,
        "step3_text has the same widths in every layer": settings.layer_budgets == "measured",
        **_shared_obstacles(said, spec, settings, "step3_text"),
    }
    return [reason for reason, there in found.items() if there]


def deepseek_v3_obstacles(said: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings) -> list[str]:
    """What the stock deepseek_v3 architecture cannot say of this conversion, each in a line."""
    plain = spec.rope.plain_pairs(spec.head_dim)
    kept = spec.qkv_bias and settings.biases == "kept"
    slowed = f"rope type {spec.rope.type} slows all frequencies but the first {plain}, so --rope-dim {2 * plain} at most"
    found = {
        "its queries and keys go through norms, which deepseek_v3 lacks": bool(spec.key_norm),
        "the source has attention biases, which deepseek_v3 engines drop; --biases regressed reads them off the input": kept
        and not spec.o_bias,
        "the source has attention biases, that of its output among them, which deepseek_v3 engines drop": spec.o_bias,
        f"rope type {spec.rope.type} is none that deepseek_v3 engines keep": plain == 0,
        slowed: 0 < 2 * plain < min(settings.rope_dim or 0, spec.head_dim),
        **_shared_obstacles(said, spec, settings, "deepseek_v3"),
        f"a rotary key wider than {spec.head_dim} repeats frequencies": (settings.rope_dim or 0) > spec.head_dim,
        "low-rank queries stand behind a norm in deepseek_v3": settings.q_rank is not None,
        "rebuilt keys are none of deepseek_v3": settings.keys == "rebuilt",
        "keys that turn whole are none of deepseek_v3": bool(settings.turned_keys),
        "deepseek_v3 has the same widths in every layer": settings.layer_budgets == "measured",
        f"--method {settings.method} leaves what deepseek_v3 cannot say": settings.method not in (None, "kvfold"),
    }
    return [reason for reason, there in found.items() if there]


def _shared_obstacles(said: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings, layout: str) -> dict[str, bool]:
    """What neither stock architecture has. `said` is the source's config with its defaults."""
    dtype, act = settings.dtype or said.get("dtype"), said.get("hidden_act") or said.get("hidden_activation")
    return {
        f"the source has a sliding window, which {layout} lacks": spec.sliding_window is not None,
        f"the MLP's {act} cannot be said in {layout}, which has silu": act != "silu",
        f"its RoPE turns a part of each head only, which {layout} cannot say": spec.rotary_dim < spec.head_dim,
        f"{spec.beside}, which {layout} cannot say": bool(spec.beside),
        f"its layers are of several kinds, which {layout} cannot say": spec.mixed,
        f"its heads have sinks, which {layout} cannot say": spec.sinks,
        f"its scores are soft-capped, which {layout} cannot say": spec.score_cap is not None,
        f"layers that stay as they are, which {layout} cannot say": settings.layers not in (None, "all", "full"),
        f"the source has MLP biases, which {layout} lacks": bool(said.get("mlp_bias")),
        f"float16 cannot hold the scaled latents of {layout}, --dtype bfloat16 can": dtype in ("float16", "fp16", "half"),
    }


def layout_for(said: dict[str, Any], spec: AttentionSpec, settings: ConvertSettings, refusals: list[str]) -> tuple[str, str]:
    """The layout and why: stock where it says all that there is to say, else ours."""
    if settings.to != "mla":
        if settings.layout == "deepseek_v3":
            refusals.append(f"--layout deepseek_v3 belongs to --to mla, not {settings.to}: leave it out")
        if settings.layout == "step3_text":
            return "step3_text", ""
        return "kvfold", f"transformers has no architecture with {settings.to}: its modelling file travels with the checkpoint"
    obstacles = deepseek_v3_obstacles(said, spec, settings)
    if settings.layout == "step3_text":
        refusals.append("--layout step3_text belongs to --to mfa, not mla: leave it out")
    if settings.layout == "deepseek_v3":
        refusals += [f"{reason}: use --layout kvfold" for reason in obstacles]
        return "deepseek_v3", ""
    if settings.layout == "kvfold" or obstacles:
        return "kvfold", f"not in deepseek_v3: {'; '.join(obstacles)}" if obstacles else "asked for"
    return "deepseek_v3", ""


def biases_read_off(spec: AttentionSpec, settings: ConvertSettings, layout: str, note: str, refusals: list[str]) -> str:
    """The note with what `--biases regressed` does, where biases are in the layout's way."""
    if settings.biases == "kept":
        return note
    if not spec.qkv_bias:
        refusals.append("--biases regressed belongs to sources whose queries, keys and values have biases: leave it out")
    elif layout != "deepseek_v3":
        refusals.append(f"--biases regressed is for deepseek_v3, and this is the {layout} layout ({note}): leave it out")
    said = "biases are read off the input where it is nearly constant, which is not exact: kvfold.json says how nearly"
    return f"{note}; {said}" if note else said


def stored_shape(
    said: dict[str, Any],
    spec: AttentionSpec,
    settings: ConvertSettings,
    layout: str,
    widths: tuple[int, int],
    note: str,
    refusals: list[str],
) -> tuple[LatentShape, str]:
    """A latent and a shared key of `widths` as the layout stores them, padded for an engine's kernels, and the note on it."""
    rank, rope_dim = widths
    stored = LatentShape(rank, rope_dim, 0 if settings.to == "mfa" else spec.head_dim, spec.head_dim)
    pads = settings.pad_for not in (None, "none")
    if layout == "deepseek_v3":
        stored, note = padded_shape(stored, settings.pad_for)
        if pads and not note.startswith("padded"):
            remedy = "give --rope-dim 64 or less and --kv-rank 512 or less"
            refusals.append(f"--pad-for {settings.pad_for} is not possible: {note}; {remedy}")
    elif layout == "step3_text":
        refusals += [f"{reason}: use --layout kvfold" for reason in step3_text_obstacles(said, spec, settings, rope_dim)]
        if not refusals:
            stored, note = padded_key(rope_dim, settings.pad_for)
    elif pads:
        refusals.append(f"--pad-for {settings.pad_for} pads for engines, and this is the kvfold layout ({note}): leave it out")
    return stored, note
