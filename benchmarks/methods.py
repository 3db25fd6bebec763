"""Every target and every way to MLA at the same cache: damage in nats on the demo model and, where it is, on stories260k.

    python benchmarks/methods.py FOLDER [--healed] [--only MODEL] [--rows ROW,…] [--print]

Each row is one conversion by the command line's own function. Rows are kept in FOLDER/methods.json and not repeated, so the run
may be stopped and begun again. Methods that leave the split between latent and rotary key free are folded with several,
and the best closed form stands for them; `--healed` also heals that one. Prints one Markdown table per model.
stories260k is read from KVFOLD_SHARED/models or ../shared/models. Minutes per healed row on one core.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.convert.checkpoint import CheckpointReader
from kvfold.convert.families import family_of
from kvfold.convert.pipeline import convert
from kvfold.convert.settings import ConvertSettings
from kvfold.evaluation.evaluate import EvaluateSettings, evaluate
from kvfold.recipes.demo.demo import EVALUATION_TOKENS, MODEL, demo_settings, write_texts
from kvfold.surgery.baselines import METHODS, REBUILT, rotary_width

SHARES = {"50%": 0.5, "25%": 0.25, "12.5%": 0.125, "6.25%": 0.0625}
SOURCES = {
    "svd-split": "MHA2MLA",
    "svd-joint": "MHA2MLA",
    "partial-rope-high": "MHA2MLA",
    "partial-rope-low": "MHA2MLA",
    "partial-rope-uniform": "MHA2MLA",
    "partial-rope-2norm": "MHA2MLA",
    "rorope": "TransMLA",
    "whitened": "CARE, keys rebuilt",
    "stock": "MLA, `deepseek_v3`",
    "own": "MLA, own layout",
    "budgets": "MLA, own layout, `--layer-budgets measured`",
    "rebuilt": "MLA, `--keys rebuilt`",
    "gqa": "GQA, MQA",
    "mfa": "MFA",
    "mfa-kr": "MFA-KR",
}
"""The rows of a table: published methods, and ours."""
OURS: dict[str, dict[str, Any]] = {
    "stock": {},
    "own": {"layout": "kvfold"},
    "budgets": {"layer_budgets": "measured"},
    "rebuilt": {"keys": "rebuilt"},
    "gqa": {"to": "gqa"},
    "mfa": {"to": "mfa"},
    "mfa-kr": {"to": "mfa-kr"},
}
SPLIT = {"stock", *METHODS} - {*REBUILT}
"""The rows that say how latent and rotary key share the cache."""


@dataclass(frozen=True)
class Model:
    """A source with its calibration settings and held-out text.

    Attributes:
        splits: shares of the cache that may rotate, for methods that leave it free.
        stock: widths of ours in `deepseek_v3`, per share of the source's cache.
    """

    name: str
    path: Path
    calibration: dict[str, Any]
    evaluation: EvaluateSettings
    splits: tuple[float, ...]
    stock: dict[str, dict[str, Any]]

    def forms(self, row: str, share: str) -> Iterable[dict[str, Any]]:
        """Every split with which a row is tried at a share of the cache."""
        spec = family_of(config := CheckpointReader(self.path).config).spec(config)
        total = int(spec.cache_numbers * SHARES[share])
        if row in OURS:
            if row != "gqa" or spec.kv_heads * SHARES[share] >= 1:
                yield {**OURS[row], **(self.stock[share] if row == "stock" else {"kv_budget": share})}
        elif share == "6.25%":
            return  # the published ways have lost all there is long before
        elif row in REBUILT:
            yield {"method": row, "kv_rank": total}
        else:
            wanted = [int(total * split) for split in self.splits]
            if row == "rorope":  # all that its authors' converter rotates at most
                wanted.append(spec.head_dim)
            for rope in sorted({rotary_width(row, spec.kv_heads, spec.head_dim, w) for w in wanted}):
                if rope < total:
                    yield {"method": row, "kv_rank": total - rope, "rope_dim": rope}


def models(folder: Path) -> list[Model]:
    calibration, heldout = write_texts(folder)
    demo = demo_settings({}, calibration)
    stock: dict[str, dict[str, Any]] = {share: {"kv_budget": share} for share in SHARES}
    evaluation = EvaluateSettings(on=str(heldout), max_tokens=EVALUATION_TOKENS, detail="damage")
    found = [Model("demo", MODEL, demo, evaluation, (0.25, 0.5), stock)]
    shared = Path(os.environ.get("KVFOLD_SHARED", "../shared"))
    if (path := shared / "models/stories260k").is_dir():
        tokens = f"{path}/tokens.safetensors"
        splits = {"50%": (24, 8), "25%": (8, 8), "12.5%": (4, 4), "6.25%": (2, 2)}
        stock = {share: {"kv_rank": rank, "rope_dim": rope} for share, (rank, rope) in splits.items()}
        evaluation = EvaluateSettings(on=f"{tokens}:evaluation", batch=32, detail="damage")
        found.insert(
            0, Model("stories260k", path, {"calibrate": f"{tokens}:calibration"}, evaluation, (0.25, 0.5, 0.75), stock)
        )
    return found


def measure(model: Model, form: dict[str, Any], healed: bool, folder: Path) -> dict[str, Any]:
    """Fold, evaluate, and say what came of it."""
    started = time.time()
    settings = {"to": "mla", **model.calibration, **form, **({} if healed else {"heal_steps": 0})}
    done = convert(str(model.path), folder / "out", ConvertSettings(**settings), overwrite=True)
    result = evaluate([str(folder / "out")], str(model.path), model.evaluation)["models"][0]
    return {
        "form": form,
        "target": done.record["target"],
        "cache": result["cache_numbers_per_token_per_layer"],
        "damage": result["damage_nats"],
        "choices": [layer["choice"] for layer in done.record["layers"]],
        "seconds": round(time.time() - started, 1),
    }


def table(model: str, kept: dict[str, dict[str, Any]]) -> str:
    """The rows of one model: the best closed form of each method → the same healed, with its split where there is a choice."""
    lines = [f"| | {' | '.join(SHARES)} |", "|---|" + "---:|" * len(SHARES)]
    for row, source in SOURCES.items():
        cells = [f"`{row}` ({source})" if row in METHODS else source]
        for share in SHARES:
            found, healed = best(kept, model, row, share), kept.get(f"{model} {row} {share} healed")
            cell = "" if found is None else f"{found['damage']:.3f}"
            cell += "" if healed is None else f" → {healed['damage']:.3f}"
            if found and row in SPLIT:
                cell += f" ({found['target']['kv_rank']} + {found['target']['rope_dim']})"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best(kept: dict[str, dict[str, Any]], model: str, row: str, share: str) -> dict[str, Any] | None:
    tried = [value for key, value in kept.items() if key.startswith(f"{model} {row} {share} {{")]
    return min(tried, key=lambda value: value["damage"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--healed", action="store_true", help="also heal the best closed form of every method")
    parser.add_argument("--only", help="one model: stories260k or demo")
    parser.add_argument("--rows", default=",".join(SOURCES), help="some rows, by commas: " + ", ".join(SOURCES))
    parser.add_argument("--print", action="store_true", help="only print the tables of what is kept")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "methods.json"
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def keep(key: str, model: Model, form: dict[str, Any], healed: bool) -> None:
        if key not in kept:
            kept[key] = measure(model, form, healed, args.folder)
            print(f"{key}: {kept[key]['damage']:.4f} in {kept[key]['seconds']:.0f} s", flush=True)
            file.write_text(json.dumps(kept, indent=1))

    chosen = [model for model in models(args.folder) if args.only in (None, model.name)]
    if not args.print:
        for healed in (False, True) if args.healed else (False,):
            for model in chosen:
                for share in SHARES:
                    for row in args.rows.split(","):
                        found = best(kept, model.name, row, share)
                        if not healed:
                            for form in model.forms(row, share):
                                keep(f"{model.name} {row} {share} {json.dumps(form)}", model, form, False)
                        elif found:
                            keep(f"{model.name} {row} {share} healed", model, found["form"], True)
    for model in chosen:
        print(f"\n{model.name}\n\n{table(model.name, kept)}")


if __name__ == "__main__":
    main()
