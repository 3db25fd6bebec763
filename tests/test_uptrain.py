"""Uptraining: what learns, that it learns, what is written, and that an interrupted run goes on as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.errors import ConversionError, Stopped, UserError
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes import rates
from kvfold.recipes.model import Student, build, open_folded
from kvfold.recipes.recipe import load_recipe, shipped
from kvfold.recipes.uptrain import uptrain

from .helpers import invoke, save_model, save_tokens

DESIGN = ".self_attn."
FOLDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gqa": ("llama", {}, {"to": "gqa", "kv_heads": 2}),
    "biased": ("qwen2", {"tie_word_embeddings": True}, {"to": "gqa", "kv_heads": 2}),
    "mla": ("llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}, {"to": "mla", "kv_rank": 16, "rope_dim": 4}),
    "mfa": ("qwen2", {}, {"to": "mfa", "width": 10, "layer_budgets": "measured"}),
    "mfa-kr": ("llama", {"tie_word_embeddings": True}, {"to": "mfa-kr", "width": 20, "q_rank": 48}),
    "rebuilt": ("mistral", {}, {"to": "mla", "kv_rank": 20, "keys": "rebuilt"}),
    "normed": ("qwen3", {}, {"to": "mla", "kv_rank": 20, "rope_dim": 12}),
    "normed-gqa": ("qwen3", {}, {"to": "gqa", "kv_heads": 2}),
}
"""Family, changes to its config, and how it is folded."""
SHORT = ["tokens=3072", "batch=4", "micro_batch=2", "eval_every=6", "eval_tokens=256", "log_every=1", "bf16=false"]
SHORT += ["learning_rate=0.01"]
"""24 steps of four windows of 32 ids."""


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each of FOLDS a teacher NAME-source and its fold NAME; tokens.safetensors to train on."""
    folder = tmp_path_factory.mktemp("uptrain")
    tokens = save_tokens(folder / "tokens.safetensors", 64, 32)
    for name, (family, changes, settings) in FOLDS.items():
        source = save_model(folder / f"{name}-source", family, initializer_range=0.2, **changes)  # sharp predictions
        convert(str(source), folder / name, ConvertSettings(**settings, calibrate=tokens, heal_steps=0))
    return folder


def run(folds: Path, name: str, out: Path, *overrides: str, recipe: str = "distill-attention", **more: Any) -> dict[str, Any]:
    weights = [] if recipe == "ce-lora" else ["ce_weight=0"]  # the text is noise
    settings = load_recipe(recipe, [*SHORT, *weights, *overrides])
    return uptrain(
        str(folds / name), out, str(folds / f"{name}-source"), settings, f"{folds}/tokens.safetensors:calibration", **more
    )


@pytest.mark.parametrize("name", FOLDS)
def test_the_student_computes_what_the_checkpoint_computes(folds: Path, name: str) -> None:
    student = build(open_folded(folds / name, None), load_recipe("distill-lora", []), None).student
    model = AutoModelForCausalLM.from_pretrained(folds / name)
    ids = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(student.causal(ids).logits, model(ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", sorted(shipped()))
@pytest.mark.parametrize("name", FOLDS)
def test_what_learns_follows_from_the_recipe_and_the_design(folds: Path, name: str, recipe: str) -> None:
    trainee = build(open_folded(folds / name, None), load_recipe(recipe, ["lora_rank=4"]), None)
    learns = set(trainee.trained())
    everything = {n for n, _ in trainee.student.named_parameters()}
    norms = {n for n in everything if n.endswith("norm.weight")}
    inside = {n for n in everything if DESIGN in n}
    assert len(norms) == 5
    assert trainee.scales.keys() == learns
    assert all(p.dtype == torch.float32 for p in trainee.trained().values())
    if recipe == "full":
        assert learns == everything
    elif not recipe.endswith("lora"):
        assert learns == inside | norms
    else:
        adapted = {n for n in inside if n.endswith(".base_layer.weight")}
        assert learns == norms | inside - adapted
        # rank 4: smaller than every matrix of most shapes, so all projections of both layers have adapters
        projections = sum(
            isinstance(m, nn.Linear) and DESIGN in n
            for n, m in build(open_folded(folds / name, None), load_recipe("full", []), None).student.named_modules()
        )
        assert len(adapted) == projections or name == "mfa"
        assert {n.replace(".base_layer.weight", ".lora_A.default.weight") for n in adapted} <= learns


def test_a_fold_is_opened_with_the_split_that_its_calibration_text_chose(tmp_path: Path) -> None:
    """In `deepseek_v3` that is one for all layers, and not the plan's own."""
    source = save_model(tmp_path / "source", "llama", initializer_range=0.2)
    tokens = save_tokens(tmp_path / "t.safetensors", 32, 32)
    settings = ConvertSettings(to="mla", kv_budget="25%", calibrate=tokens, heal_steps=0)
    record = convert(str(source), tmp_path / "fold", settings).record
    assert record["target"]["layout"] == "deepseek_v3"
    chosen = record["target"]["kv_rank"], record["target"]["rope_dim"]
    own = make_plan(record["source_config"], settings)
    assert chosen != (own.kv_rank, own.rope_dim) and sum(chosen) == own.kv_rank + own.rope_dim
    folded = open_folded(tmp_path / "fold", None)
    assert (folded.plan.kv_rank, folded.plan.rope_dim) == chosen
    student = build(folded, load_recipe("distill-attention", []), None).student
    ids = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "fold")(ids).logits
        torch.testing.assert_close(student.causal(ids).logits, wanted, atol=2e-4, rtol=1e-4)


def test_layers_with_experts_are_trained_around_them(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3_moe", initializer_range=0.2)
    tokens = save_tokens(tmp_path / "t.safetensors", 32, 32)
    convert(str(source), tmp_path / "fold", ConvertSettings(to="mla", kv_rank=20, rope_dim=12, calibrate=tokens, heal_steps=0))
    folded = open_folded(tmp_path / "fold", None)
    student = build(folded, load_recipe("distill-attention", []), None).student
    ids = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "fold")(ids).logits
        torch.testing.assert_close(student.causal(ids).logits, wanted, atol=2e-4, rtol=1e-4)
    with pytest.raises(UserError, match="train=full is not possible where layers have experts"):
        build(folded, load_recipe("full", []), None)
    settings = load_recipe("distill-attention", [*SHORT, "ce_weight=0"])
    uptrain(str(tmp_path / "fold"), tmp_path / "out", str(source), settings, tokens)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fold", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert any("kv_a_proj" in name for name in changed)
    assert not any("experts" in name for name in changed)


OTHER_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"to": "gqa", "kv_heads": 2}),
    ("gemma3_text", {"to": "mla", "kv_rank": 20, "rope_dim": 12}),
    ("cohere2", {"to": "mfa-kr", "width": 20}),
    ("gpt_oss", {"to": "mla", "kv_rank": 20, "keys": "rebuilt", "layers": "all"}),
    ("gpt_neox", {"to": "mla", "kv_rank": 20, "rope_dim": 12}),
    ("phi", {"to": "mfa", "width": 10}),
]
"""Families with layers of several kinds, soft caps, sinks, other tables of RoPE, names of their own, biases of the output."""


@pytest.mark.parametrize(("family", "settings"), OTHER_KINDS)
def test_students_of_other_kinds_predict_what_the_checkpoint_predicts(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source", family, initializer_range=0.2)
    tokens = save_tokens(tmp_path / "t.safetensors", 32, 32)
    convert(str(source), tmp_path / "fold", ConvertSettings(**settings, calibrate=tokens, heal_steps=0))
    student = build(open_folded(tmp_path / "fold", None), load_recipe("distill-attention", []), None).student
    ids = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "fold")(ids, labels=ids)
        torch.testing.assert_close(student.causal(ids).logits, wanted.logits, atol=2e-4, rtol=1e-4)
        assert float(student(ids)["ce"]) == pytest.approx(float(wanted.loss), rel=1e-4)


def test_layers_that_stay_are_trained_around(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "gemma3_text", initializer_range=0.2)
    tokens = save_tokens(tmp_path / "t.safetensors", 32, 32)
    convert(str(source), tmp_path / "fold", ConvertSettings(to="mfa", width=4, calibrate=tokens, heal_steps=0))
    settings = load_recipe("distill-attention", [*SHORT, "ce_weight=0", "learning_rate=0.001"])
    entry = uptrain(str(tmp_path / "fold"), tmp_path / "out", str(source), settings, tokens)
    assert entry["held_out_loss"]["after"] < entry["held_out_loss"]["before"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("fold", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.2.self_attn.kv_a_proj.weight" in changed
    assert not any(f"layers.{layer}.self_attn.{role}_proj" in name for name in changed for layer in (0, 1) for role in "qkvo")


def test_an_adapter_as_large_as_its_matrix_is_not_made(folds: Path) -> None:
    trainee = build(open_folded(folds / "mla", None), load_recipe("distill-lora", ["lora_rank=16"]), None)
    full = [n for n in trainee.trained() if DESIGN in n and "lora" not in n]
    assert sorted({n.split(DESIGN)[1] for n in full}) == ["kv_a_proj.weight", "kv_b_proj.weight"]  # (20, 64), (128, 16)
    assert isinstance(trainee.student.get_submodule(full[0].removesuffix(".weight")), nn.Linear)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gqa", "distill-lora"),
        ("biased", "distill-lora"),
        *(("mla", recipe) for recipe in sorted(shipped())),
        *((name, "distill-lora") for name in ("mfa", "mfa-kr", "rebuilt")),
    ],
)
def test_it_learns_and_writes_the_same_kind_of_checkpoint(folds: Path, tmp_path: Path, name: str, recipe: str) -> None:
    """The checkpoint as transformers loads it has the held-out losses that training ended with."""
    tokens = save_tokens(tmp_path / "held.safetensors", 8, 32, seed=5)
    entry = run(folds, name, tmp_path / "out", "learning_rate=0.03", recipe=recipe, held_out=tokens)
    best = min(entry["held_out"][1:], key=lambda row: row["loss"])
    assert best["loss"] < 0.9 * entry["held_out"][0]["loss"] or (recipe == "ce-lora" and entry["curve"][-1][1] < 7)
    found = evaluate([str(tmp_path / "out")], str(folds / f"{name}-source"), EvaluateSettings(on=tokens))["models"][0]
    if recipe != "ce-lora":
        assert found["kl"] == pytest.approx(best["kl"], abs=1e-4)
    assert found["nll"] == pytest.approx(best["ce"], abs=1e-4)

    before, after = CheckpointReader(folds / name), CheckpointReader(tmp_path / "out")
    assert (after.folder / "config.json").read_bytes() == (before.folder / "config.json").read_bytes()
    assert {n: (e.dtype, e.shape) for n, e in after.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in before.entries.items()
    }
    same = {n for n in before.entries if torch.equal(before.tensor(n), after.tensor(n))}
    still = {n for n in before.entries if "mlp" in n or "embed" in n or "lm_head" in n}
    assert not same if recipe == "full" and name != "mla" else (still & same == (set() if recipe == "full" else still))
    assert not {n for n in same if "self_attn" in n and "kv_a_layernorm" not in n and "rope_pairs" not in n}
    record = json.loads((tmp_path / "out" / "kvfold.json").read_text())
    assert record["uptraining"] == [json.loads(json.dumps(entry))]
    assert entry["tokens"] == 24 * 4 * 32 and entry["steps"] == 24
    assert not (tmp_path / "out.partial").exists()


def test_uptraining_can_be_repeated(folds: Path, tmp_path: Path) -> None:
    """The second begins with what the first wrote, what is not attention included; the source's config lies in the folder."""
    first = run(folds, "mla", tmp_path / "one", recipe="full")
    recipe = load_recipe("ce-lora", [*SHORT, "kl_weight=0.0"])
    tokens = f"{folds}/tokens.safetensors:calibration"
    second = uptrain(str(tmp_path / "one"), tmp_path / "two", None, recipe, tokens)
    assert second["teacher"] is None
    recorded = json.loads((folds / "mla" / "kvfold.json").read_text())
    assert recorded["source_config"] == json.loads((folds / "mla-source" / "config.json").read_text())
    assert second["held_out"][0]["ce"] == pytest.approx(min(first["held_out"][1:], key=lambda row: row["loss"])["ce"], abs=1e-4)
    assert len(json.loads((tmp_path / "two" / "kvfold.json").read_text())["uptraining"]) == 2


def test_the_teacher_writes_text_to_train_on(folds: Path, tmp_path: Path) -> None:
    """Beside another text; other text than calibration has of the same seed, and the same of it when a run is repeated."""
    from kvfold.convert.source.data import sample_from_source

    recipe = load_recipe("distill-attention", [*SHORT, "ce_weight=0", "tokens=1024", "window=32", "eval_every=1"])
    text, told = f"{folds}/tokens.safetensors:calibration", []
    for name, data in (("one", f"{text},self:512"), ("two", f"{text},self:512"), ("alone", text)):
        entry = uptrain(str(folds / "gqa"), tmp_path / name, str(folds / "gqa-source"), recipe, data, log=told.append)
        assert entry["data"] == data
    assert [line for line in told if "writes" in line] == 2 * ["the source writes text, window 1/16"]
    one, two, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "alone"))
    assert all(one[name].equal(tensor) for name, tensor in two.items())
    assert not all(one[name].equal(tensor) for name, tensor in alone.items())
    own = [sample_from_source(folds / "gqa-source", 32, 512, torch.device("cpu"), seed, 16, print).ids for seed in (0, 1)]
    assert not own[0].equal(own[1])


def test_nobody_writes_text_without_a_teacher(folds: Path, tmp_path: Path) -> None:
    recipe = load_recipe("ce-lora", [*SHORT, "window=32"])
    with pytest.raises(UserError, match="--data self: the teacher would write it, and without kl_weight there is none"):
        uptrain(str(folds / "gqa"), tmp_path / "out", None, recipe, "self")
    assert not (tmp_path / "out.partial").exists()


def test_bf16_checkpoints_stay_bf16(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", torch.bfloat16)
    tokens = save_tokens(tmp_path / "t.safetensors", 64, 32)
    convert(str(source), tmp_path / "gqa", ConvertSettings(to="gqa", kv_heads=4))
    trainee = build(open_folded(tmp_path / "gqa", None), load_recipe("distill-lora", []), None)
    assert trainee.student.causal.base_model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    entry = uptrain(
        str(tmp_path / "gqa"), tmp_path / "out", str(source), load_recipe("distill-lora", [*SHORT, "bf16=true"]), tokens
    )
    assert entry["held_out"][-1]["kl"] < entry["held_out"][0]["kl"]
    assert {e.dtype for e in CheckpointReader(tmp_path / "out").entries.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_a_kept_adapter_gives_what_merging_gives(folds: Path, tmp_path: Path, name: str) -> None:
    """Loaded by transformers and peft as any adapter, and only as large as one."""
    for kept in (True, False):
        run(folds, name, tmp_path / str(kept), "lora_rank=4", "learning_rate=0.03", recipe="distill-lora", keep_adapter=kept)
    adapted, merged, base = (
        AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "True", tmp_path / "False", folds / name)
    )
    ids = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [model(ids).logits for model in (adapted, merged, base)]
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.1
    assert json.loads((tmp_path / "True" / "adapter_config.json").read_text())["r"] == 4
    assert not (tmp_path / "True" / "config.json").exists()
    code, message = invoke("uptrain", tmp_path / "True", tmp_path / "again", "--data", "x")
    assert code == 2 and "is an adapter" in message


def curve(entry: dict[str, Any]) -> tuple[Any, Any]:
    return entry["curve"], entry["held_out"]


def at_step(step: int, act: Callable[[], Any]) -> Callable[[str], None]:
    """A log that acts when a step's loss is told."""
    return lambda line: act() if line.startswith(f"step {step}/") and " loss" in line else None


@pytest.mark.parametrize("recipe", ["distill-attention", "distill-lora"])
def test_sigterm_saves_and_resume_goes_on_exactly(folds: Path, tmp_path: Path, recipe: str) -> None:
    whole = run(folds, "mla", tmp_path / "whole", recipe=recipe)
    with pytest.raises(Stopped, match="stopped at step 9 of 24, saved: go on with --resume"):
        run(folds, "mla", tmp_path / "out", recipe=recipe, log=at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (tmp_path / "out").exists()
    resumed = run(folds, "mla", tmp_path / "out", recipe=recipe, resume=True)
    assert resumed["resumed_from_step"] == 9
    assert curve(resumed) == curve(whole)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_kill_at_any_step_and_a_torn_checkpoint_are_survived(folds: Path, tmp_path: Path) -> None:
    """Killed between two checkpoints, and the newer of them torn as by a kill while it was written."""
    whole = run(folds, "gqa", tmp_path / "whole")
    script = f"""
import os, signal, sys
from tests.test_uptrain import at_step, run
from pathlib import Path
run(Path({str(folds)!r}), "gqa", Path({str(tmp_path / "out")!r}), log=at_step(15, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert {p.name for p in partial.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}
    state = partial / "checkpoint-12" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    code, message = invoke("uptrain", folds / "gqa", tmp_path / "out", "window=32", "--data", "x")
    assert code == 2 and "go on with --resume" in message
    resumed = run(folds, "gqa", tmp_path / "out", resume=True)
    assert resumed["resumed_from_step"] == 6
    assert resumed["curve"] == whole["curve"]
    assert resumed["held_out"] == whole["held_out"]


def test_resume_may_lower_the_learning_rate_and_nothing_else(folds: Path, tmp_path: Path) -> None:
    stop = at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run(folds, "gqa", tmp_path / "out", log=stop)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "copy.partial")
    data = f"{folds}/tokens.safetensors:calibration"
    teacher = ["--teacher", folds / "gqa-source", "--recipe", "distill-attention", "--data", data, "--resume"]
    code, message = invoke("uptrain", folds / "gqa", tmp_path / "out", *SHORT, "kl_weight=0.5", "ce_weight=0", *teacher)
    assert code == 2 and "begun with other settings (kl_weight)" in message
    teacher[1] = folds / "mla-source"
    code, message = invoke("uptrain", folds / "mla", tmp_path / "out", *SHORT, "ce_weight=0", *teacher)
    assert code == 2 and "an adapter of another design (to gqa, kv_heads 2" in message
    slow = run(folds, "gqa", tmp_path / "out", "learning_rate=1e-9", resume=True)
    same = run(folds, "gqa", tmp_path / "copy", resume=True)
    assert slow["curve"][:9] == same["curve"][:9]
    assert slow["held_out"][-1]["loss"] == pytest.approx(slow["held_out"][-2]["loss"], abs=1e-5)
    assert same["held_out"][-1]["loss"] < same["held_out"][-2]["loss"] - 1e-4


def test_a_loss_that_is_not_finite_stops_with_the_step_and_a_hint(
    folds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConversionError, match=r"the loss is nan at step \d of 24; start again with a lower learning_rate"):
        run(folds, "gqa", tmp_path / "out", "learning_rate=1e30")
    shutil.rmtree(tmp_path / "out.partial")

    seen, forward = [0], Student.forward

    def poisoned(student: Student, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        losses = forward(student, *args, **kwargs)
        seen[0] += student.training
        return {**losses, "loss": losses["loss"] * (float("nan") if seen[0] == 15 else 1.0)}  # two of them in a step

    with monkeypatch.context() as patch:
        patch.setattr(Student, "forward", poisoned)
        with pytest.raises(ConversionError, match=r"nan at step 8 of 24; the last good checkpoint is .*checkpoint-6: go"):
            run(folds, "gqa", tmp_path / "out")
    assert run(folds, "gqa", tmp_path / "out", "learning_rate=0.005", resume=True)["resumed_from_step"] == 6


def test_what_beats_nothing_is_not_written(folds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that was given is the bar, in a resumed run too; a result says how far below it came."""
    out, data = tmp_path / "out", f"{folds}/tokens.safetensors:calibration"
    teacher = ["--teacher", folds / "gqa-source", "--recipe", "distill-attention", "--data", data]
    code, message = invoke("uptrain", folds / "gqa", out, *SHORT, "ce_weight=0", "learning_rate=100", *teacher)
    assert code == 1 and message.splitlines()[-1].startswith("kvfold: held-out loss was ")
    assert "at best in 24 steps, so nothing is written: lower learning_rate (now 100) or set it to auto" in message
    assert not list(tmp_path.iterdir())
    with pytest.raises(Stopped):
        run(folds, "gqa", out, "learning_rate=100", log=at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(ConversionError, match="so nothing is written"):
        run(folds, "gqa", out, "learning_rate=100", resume=True)
    assert not list(tmp_path.iterdir())

    entry = run(folds, "gqa", out)
    losses = [row["loss"] for row in entry["held_out"]]
    assert entry["held_out_loss"] == {"before": losses[0], "after": min(losses)}
    assert entry["best_step"] == 6 * losses.index(min(losses)) > 0
    assert json.loads((out / "kvfold.json").read_text())["uptraining"][0]["held_out_loss"] == entry["held_out_loss"]

    monkeypatch.setattr(Student, "forward", lambda *_, **__: {key: torch.tensor(torch.nan) for key in ("loss", "kl", "ce")})
    with pytest.raises(ConversionError, match="held-out loss of the checkpoint is nan before the first step: convert again"):
        run(folds, "gqa", tmp_path / "broken")


def test_a_measured_rate_is_that_of_least_held_out_loss(folds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tries begin at the checkpoint that was given; the run is that of the rate by itself, and keeps it when resumed."""
    auto = run(folds, "mla", tmp_path / "auto", "learning_rate=auto")
    tried = dict(auto["rates_tried"])
    chosen = min(tried, key=lambda rate: tried[rate])
    assert auto["recipe"]["learning_rate"] == chosen
    assert list(tried) == list(rates.RATES[: len(tried)]) and len(tried) > 1
    assert all(loss < auto["held_out_loss"]["before"] for loss in list(tried.values())[:-1])
    given = run(folds, "mla", tmp_path / "given", f"learning_rate={chosen}")
    assert curve(given) == curve(auto) and "rates_tried" not in given
    # the first 16 steps at a rate, by themselves: a warm-up of four, then constant
    by_hand = run(
        *(folds, "mla", tmp_path / "hand", f"learning_rate={chosen}", "tokens=2048", "schedule=constant", "warmup=0.25"),
        "eval_every=16",
    )
    assert by_hand["held_out"][-1]["loss"] == pytest.approx(tried[chosen], rel=1e-6)

    with pytest.raises(Stopped):
        stop = at_step(8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(folds, "mla", tmp_path / "out", "learning_rate=auto", log=stop)
    monkeypatch.setattr(rates, "RATES", ())  # nothing is measured again
    resumed = run(folds, "mla", tmp_path / "out", "learning_rate=auto", resume=True)
    assert curve(resumed) == curve(auto)
    assert dict(resumed["rates_tried"]) == tried


def test_no_rate_gives_a_finite_loss(folds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "RATES", (1e30, 1e31))
    with pytest.raises(ConversionError, match=r"no loss is finite after 16 steps, not even at learning_rate=1e\+30"):
        run(folds, "gqa", tmp_path / "out", "learning_rate=auto")


def test_gradient_checkpointing_changes_nothing_but_memory(folds: Path, tmp_path: Path) -> None:
    entries = [
        run(folds, "mla", tmp_path / on, f"gradient_checkpointing={on}", "tokens=768", recipe="distill-lora")
        for on in ("true", "false")
    ]
    for (_, ours), (_, theirs) in zip(*(entry["curve"] for entry in entries), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bound"), [("distill-attention", 0.20), ("distill-lora", 0.24)])
def test_stories(shared: Path, tmp_path: Path, recipe: str, bound: float) -> None:
    """From the healed MLA 8 + 8 (0.224 nats), one million token-passes at most; `evaluation` is never seen."""
    source = shared / "models/stories260k"
    tokens = f"{source}/tokens.safetensors"
    settings = ConvertSettings(to="mla", kv_rank=8, rope_dim=8, calibrate=f"{tokens}:calibration")
    convert(str(source), tmp_path / "mla", settings)
    data = f"{tokens}:calibration,{tokens}:uptraining"
    entry = uptrain(str(tmp_path / "mla"), tmp_path / "out", str(source), load_recipe(recipe, []), data)
    assert entry["tokens"] <= 1_002_000
    result = evaluate([str(tmp_path / "out")], str(source), EvaluateSettings(on=f"{tokens}:evaluation", batch=32))
    assert result["models"][0]["damage_nats"] < bound


def launch(folds: Path, out: Path, processes: int) -> dict[str, Any]:
    """`distill-lora` under `accelerate launch` on CPU processes that speak over gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0", "-m", "kvfold", "uptrain"]
    command += [str(folds / "mla"), str(out), *SHORT, "ce_weight=0", "lora_rank=4", "--json", f"{out}.json"]
    command += ["--data", f"{folds}/tokens.safetensors:calibration", "--teacher", str(folds / "mla-source")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("windows of 32 ids in 24 steps") == 1  # one of them speaks
    return json.loads(Path(f"{out}.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(folds: Path, tmp_path: Path) -> None:
    alone = run(folds, "mla", tmp_path / "one", "lora_rank=4", recipe="distill-lora")
    both = launch(folds, tmp_path / "two", 2)
    for (tokens, ours), (same, theirs) in zip(both["curve"], alone["curve"], strict=True):
        assert tokens == same and ours == pytest.approx(theirs, rel=1e-5)
    assert both["held_out"][-1]["kl"] == pytest.approx(alone["held_out"][-1]["kl"], rel=1e-5)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-6)


SHARDED = """
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kvfold.recipes.model import build, open_folded
from kvfold.recipes.recipe import load_recipe

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
recipe = load_recipe("distill-lora", ["lora_rank=4", "gradient_checkpointing=true"])
whole, sharded = (build(open_folded(Path(sys.argv[1]), None), recipe, torch.float32).student.train() for _ in range(2))
for module in sharded.modules():
    if type(module).__name__ in sharded._no_split_modules:
        fully_shard(module, mesh=mesh)
fully_shard(sharded, mesh=mesh)
torch.manual_seed(0)
ids, reference, head = torch.randint(128, (2, 32)), torch.randn(2, 31, 64), torch.nn.Linear(64, 128, bias=False)
losses = [student(ids, reference, head)["loss"] for student in (whole, sharded)]
for loss in losses:
    loss.backward()
torch.testing.assert_close(losses[1], losses[0])
for name, parameter in sharded.named_parameters():
    if parameter.requires_grad:
        torch.testing.assert_close(parameter.grad.full_tensor(), whole.get_parameter(name).grad)
print("the same")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_student_in_shards_has_the_gradients_of_a_whole_one(folds: Path, tmp_path: Path) -> None:
    """FSDP2 over its decoder layers, as accelerate shards it on GPUs."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "sharded.py"), str(folds / "mla")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.count("the same") == 2, done.stderr[-3000:]
