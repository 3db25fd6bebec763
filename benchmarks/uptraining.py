"""What uptraining wins back on the demo model, and what it costs.

    python benchmarks/uptraining.py [FOLD …] [--tokens N]

Every fold of the demo's table that is named is made in closed form and healed, and the healed one is uptrained by each
recipe, on the standard library without the held-out modules. Damage is measured on those, and on a second text that no recipe
has seen (`--second`, by default WikiText-2 in the folder that KVFOLD_SHARED names). Then the same number of steps is timed
for `distill-lora` and for plain PEFT fine-tuning of the source, each in a process of its own.

Writes results.json, table.md and curves.png into `--out`, and goes on where it was interrupted. A million tokens take ten to
twenty minutes of one core.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.demo.corpus import HELDOUT, standard_library
from kvfold.recipes.demo.demo import FOLDS, MODEL, PIECE, demo_settings, write_texts
from kvfold.recipes.recipe import load_recipe
from kvfold.recipes.uptrain import uptrain

RECIPES = ("distill-lora", "distill-attention")
SECOND = Path(os.environ.get("KVFOLD_SHARED", "../shared")) / "data/wikitext2-valid.txt"
EVALUATED = 32768
TIMED_STEPS, WINDOW, BATCH = 16, 512, 8


def write_training_text(folder: Path) -> Path:
    """The standard library without the held-out modules, cut into pieces and shuffled, as the demo does it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = standard_library(exclude=HELDOUT)
    pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
    random.Random(1).shuffle(pieces)
    for number, text in enumerate(pieces):
        (folder / f"{number:05d}.py").write_text(text, encoding="utf-8")
    return folder


def recover(folds: list[str], out: Path, tokens: int, second: Path) -> list[dict[str, Any]]:
    """For each fold: damage in closed form, healed and uptrained by each recipe, on both texts, and the learning curves."""
    calibration, heldout = write_texts(out)
    training = write_training_text(out / "training")
    rows = []
    for fold in folds:
        choice = {key: value for key, value in FOLDS[fold].items() if key != "heal_steps"}
        for name, more in ((fold, {"heal_steps": 0}), (f"{fold}-healed", {})):
            if not (out / name).exists():
                convert(str(MODEL), out / name, ConvertSettings(**demo_settings({**choice, **more}, calibration)))
        entries = {}
        for recipe in RECIPES:
            name = f"{fold}-{recipe}"
            if not (out / name).exists():
                settings = load_recipe(recipe, [f"tokens={tokens}"])
                uptrain(str(out / f"{fold}-healed"), out / name, str(MODEL), settings, str(training), resume=True, log=print)
            entries[recipe] = json.loads((out / name / "kvfold.json").read_text())["uptraining"][-1]
        made = [fold, f"{fold}-healed", *(f"{fold}-{recipe}" for recipe in RECIPES)]
        damage = {}
        for label, text in (("held-out", heldout), ("second", second)):
            settings = EvaluateSettings(on=str(text), max_tokens=EVALUATED, detail="damage")
            result = evaluate([str(out / name) for name in made], str(MODEL), settings)
            damage[label] = {Path(m["path"]).name: m["damage_nats"] for m in result["models"]}
        rows.append({"fold": fold, "damage": damage, "uptraining": entries})
        print(json.dumps(damage, indent=2), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | text | closed form | healed | " + " | ".join(f"`{r}`" for r in RECIPES) + " | of what healing left | of all |",
        "|---|---|" + "---:|" * (len(RECIPES) + 4),
    ]
    for row in rows:
        for label, damage in row["damage"].items():
            closed, healed, *after = damage.values()
            best = min(after)
            cells = [f"{value:+.4f}" for value in damage.values()]
            shares = [f"{1 - best / healed:.0%}", f"{1 - best / closed:.1%}"]
            lines.append(f"| {row['fold']} | {label} | " + " | ".join([*cells, *shares]) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(rows), figsize=(2.8 * len(rows), 3), sharey=True, squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        for recipe, entry in row["uptraining"].items():
            points = entry["held_out"]
            axis.plot([p["tokens"] / 1e6 for p in points], [p["kl"] for p in points], label=recipe)
        axis.set(title=row["fold"], xlabel="million tokens", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("KL from the source, nats")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def time_plain(training: Path) -> None:
    """Plain PEFT fine-tuning of the source with the same window, batch, rank and precision."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from kvfold.convert.source.data import load_windows

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print(f"step {state.global_step}/", flush=True)

    windows = load_windows(str(training), MODEL, WINDOW, TIMED_STEPS * BATCH * WINDOW)
    rows = datasets.Dataset.from_dict({"input_ids": windows.ids.tolist(), "labels": windows.ids.tolist()})
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    args = TrainingArguments(
        output_dir=str(training.parent / "plain"),
        per_device_train_batch_size=BATCH,
        max_steps=TIMED_STEPS,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(adapted, args, train_dataset=rows, callbacks=[Clock()]).train()


def time_kvfold(training: Path, fold: str) -> None:
    pairs = [f"tokens={TIMED_STEPS * BATCH * WINDOW}", "eval_every=1000", "eval_tokens=512", "log_every=1", "bf16=true"]
    pairs += [f"window={WINDOW}", f"batch={BATCH}", f"micro_batch={BATCH}", "device=cpu"]
    settings = load_recipe("distill-lora", pairs)
    folder = training.parent
    uptrain(str(folder / f"{fold}-healed"), folder / "timed", str(MODEL), settings, str(training), overwrite=True, log=_tell)


def _tell(line: str) -> None:
    print(line, flush=True)


def cost(mode: str, out: Path, fold: str) -> dict[str, float]:
    """Run one of the two in a process of its own: tokens per second behind the first steps, and peak memory."""
    command = [sys.executable, __file__, fold, "--out", str(out), "--time", mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen: dict[int, float] = {}
    peak = 0
    for line in process.stdout:
        if line.startswith("step ") and "held-out" not in line:
            seen[int(line.split()[1].split("/")[0])] = time.time()
        if line.startswith("peak "):
            peak = int(line.split()[1])
    if process.wait():
        raise SystemExit(f"{mode} failed")
    first, last = 5, TIMED_STEPS - 1
    return {"tokens_per_second": (last - first) * BATCH * WINDOW / (seen[last] - seen[first]), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="*", default=["gqa-2", "mla-25"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/uptraining"))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--second", type=Path, default=SECOND)
    parser.add_argument("--time", choices=["plain", "kvfold"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time:
        time_plain(args.out / "training") if args.time == "plain" else time_kvfold(args.out / "training", args.folds[0])
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}")
        return
    rows = recover(args.folds, args.out, args.tokens, args.second)
    # in turn, twice, so that a busy machine shows
    costs = [{mode: cost(mode, args.out, args.folds[0]) for mode in ("plain", "kvfold")} for _ in range(2)]
    (args.out / "results.json").write_text(json.dumps({"recovered": rows, "cost": costs}, indent=2) + "\n")
    (args.out / "table.md").write_text(table(rows))
    print(table(rows))
    for run in costs:
        print({mode: {k: round(v) for k, v in numbers.items()} for mode, numbers in run.items()})
    plot(rows, args.out / "curves.png")


if __name__ == "__main__":
    main()
