"""What uptraining wins back on its own text and on another, beside the source fine-tuned on the same tokens.

    python benchmarks/uptraining.py SOURCE FOLDED… --data TEXT --on TEXT --second TEXT [--recipes NAME …] [--out DIR]
        [--max-tokens N] [--set KEY=VALUE …]

Every FOLDED checkpoint of SOURCE is uptrained on `--data` by each recipe. Some of what that gains comes from the text alone, so
the source is fine-tuned too, on the same windows, without a teacher. All are measured on `--on`, which should be more of the
same text, and on `--second`, which none has seen. `--set` gives settings of the recipes, the fine-tuning's included.

Writes on.json and second.json (as `kvfold evaluate --json`) and table.md into `--out`, and goes on where it was interrupted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.configfile import read_config
from kvfold.errors import NothingGained
from kvfold.evaluation.evaluate import evaluate
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.recipe import load_recipe
from kvfold.recipes.uptrain import uptrain

TUNED = ("distill-attention", ["kl_weight=0", "ce_weight=1"])
"""How the source is fine-tuned: its attention and norms, as `distill-attention` trains those of a fold."""


def trained(source: Path, folded: list[Path], recipes: list[str], pairs: list[str], data: str, out: Path) -> list[Path]:
    """Uptrain every fold by every recipe, fine-tune the source, and return all checkpoints, the folds as they were included."""
    same = out / "source"  # with as many key heads as before: what `uptrain` takes
    if not same.exists():
        config = read_config(source)
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        convert(str(source), same, ConvertSettings(to="gqa", kv_heads=heads, method="mean"))
    jobs = [(fold, recipe, []) for fold in folded for recipe in recipes]
    made = [*folded]
    for start, recipe, more in [*jobs, (same, *TUNED)]:
        result = out / f"{start.name}-{'tuned' if start == same else recipe}"
        if not result.exists():
            settings = load_recipe(recipe, [*more, *pairs])
            try:
                uptrain(str(start), result, str(source), settings, data, resume=True, log=print)
            except NothingGained as error:
                print(f"{result.name}: {error}")
        made += [result] if result.exists() else []
    return made


def table(results: dict[str, dict[str, Any]]) -> str:
    """Damage, KL and top-1 agreement of every checkpoint on each text."""
    lines = ["| | text | damage | KL | top-1 agrees |", "|---|---|---:|---:|---:|"]
    for label, result in results.items():
        for model in result["models"]:
            name = Path(model["path"]).name
            cells = f"{model['damage_nats']:.3f} | {model['kl']:.3f} | {model['top1_agreement']:.1%}"
            lines.append(f"| {name} | {label} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folded", type=Path, nargs="+")
    for name in ("--data", "--on", "--second"):
        parser.add_argument(name, required=True)
    parser.add_argument("--recipes", nargs="+", default=["distill-attention"])
    parser.add_argument("--set", nargs="+", default=[], dest="pairs")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/uptraining"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    made = trained(args.source, args.folded, args.recipes, args.pairs, args.data, args.out)
    results = {}
    for label, text in (("on", args.on), ("second", args.second)):
        settings = EvaluateSettings(on=text, max_tokens=args.max_tokens, detail="damage")
        results[label] = evaluate([str(path) for path in made], str(args.source), settings)
        (args.out / f"{label}.json").write_text(json.dumps(results[label], indent=2) + "\n")
    (args.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
