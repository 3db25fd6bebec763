"""Every target and every published way to MLA on language models, at the same cache: in closed form, healed and uptrained.

    python benchmarks/real_models.py MODEL… --on TEXT --calibrate TEXT [--rows …] [--budgets …] [--stages …] [--set key=value …]

MODEL is a folder or a Hub id. Every result goes into FOLDER/results.json as soon as it is there and is not made again, so the
run may be stopped and repeated; other settings make other results. FOLDER/tables.md and FOLDER/MODEL.png are drawn from what
is there, and --publish keeps it in docs/results, for the tables of README and docs. Ways that leave the split between latent
and rotary key free are folded with several; the best closed form stands for them and is healed, and the healed one is
uptrained. Conversions and uptrainings run in a process each, and their seconds and peak memory are their own. Minutes to hours
a result on a CPU.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import real_tables
import results
import yaml
from apart import apart

import kvfold
from kvfold.convert.families import AttentionSpec, family_of
from kvfold.convert.pipeline import convert, pick_device
from kvfold.convert.planning.settings import ConvertSettings, parse_budget, parse_settings, unknown
from kvfold.convert.source.checkpoint import CheckpointReader
from kvfold.convert.source.fetch import fetch_checkpoint
from kvfold.errors import ConversionError, NothingGained, UserError
from kvfold.evaluation.evaluate import Bench, held_out_windows
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.recipes.recipe import load_recipe
from kvfold.recipes.uptrain import uptrain
from kvfold.surgery.names import PUBLISHED, REBUILT, rotary_width

STAGES = ("closed", "healed", "uptrained")
SHARES = "50%,25%,12.5%"
MHA2MLA = (120, 72, 48)
"""Numbers per token and layer of its three SmolLM-135M, of 384: rotary keys of 24 and 32, 16 and 8 for each of 3 heads."""
OURS: dict[str, dict[str, Any]] = {
    "stock": {"to": "mla"},
    "own": {"to": "mla", "layout": "kvfold"},
    "budgets": {"to": "mla", "layer_budgets": "measured"},
    "rebuilt": {"to": "mla", "keys": "rebuilt"},
    "mfa": {"to": "mfa"},
    "mfa-kr": {"to": "mfa-kr"},
}
ROWS = (*PUBLISHED, "gqa", *OURS)


@dataclass(frozen=True)
class Model:
    """A source: what it was called, and its folder."""

    name: str
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return CheckpointReader(self.folder).config

    @cached_property
    def spec(self) -> AttentionSpec:
        return family_of(self.config).spec(self.config)

    @cached_property
    def weights(self) -> str:
        """SHA-256 of its weights."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("*.safetensors")):
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

    def totals(self, budgets: str | None) -> list[int]:
        """Numbers per token and layer, largest first: shares of the cache, or numbers as they are."""
        spec = self.spec
        own = (spec.kv_heads, spec.head_dim) == (3, 64) and budgets is None
        asked = [part.strip() for part in (budgets or SHARES).split(",")]
        totals = {int(t) if t.isdigit() else int(spec.cache_numbers * parse_budget(t)) for t in asked}
        return sorted(totals | set(MHA2MLA if own else ()), reverse=True)

    def forms(self, row: str, total: int, splits: list[float]) -> Iterator[dict[str, Any]]:
        """Every form in which a row is tried at so many numbers per token and layer."""
        spec = self.spec
        if row in OURS:  # half a number more, so that the share of the cache comes down to the same numbers again
            yield {**OURS[row], "kv_budget": f"{(total + 0.5) / spec.cache_numbers:.8f}"}
        elif row == "gqa":
            room = total // (2 * spec.head_dim)
            if heads := max((g for g in range(1, room + 1) if spec.kv_heads % g == 0), default=0):
                yield {"to": "gqa", "kv_heads": heads}
        elif row in REBUILT:
            yield {"to": "mla", "method": row, "kv_rank": total}
        else:
            # also one head's width, all that TransMLA's converter rotates at most, and the eighth of it that MHA2MLA keeps
            wanted = [*(int(total * split) for split in splits), spec.kv_heads * spec.head_dim // 8]
            wanted += [spec.head_dim] if row == "rorope" else []
            for rope in sorted({rotary_width(row, spec.kv_heads, spec.head_dim, w) for w in wanted}):
                if rope < total:
                    yield {"to": "mla", "method": row, "kv_rank": total - rope, "rope_dim": rope}


def fold(source: str, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    resume = out.with_name(out.name + ".partial").exists()
    record = convert(source, out, parse_settings(ConvertSettings, settings), resume=resume).record
    return {"settings": record["settings"], "calibration_tokens": record["calibration_tokens"]}


def train(folded: str, out: Path, source: str, recipe: str, pairs: list[str], data: str) -> dict[str, Any]:
    return {"uptraining": uptrain(folded, out, source, load_recipe(recipe, pairs), data, resume=True, log=print)}


class Benchmark:
    """What is asked for, and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows, self.stages = (listed(text, known) for text, known in ((args.rows, ROWS), (args.stages, STAGES)))
        self.splits = [float(split) for split in args.splits.split(",")]
        self.set = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)}
        parse_settings(ConvertSettings, {"to": "mla", **self.set})  # what is wrong with them is wrong with every row
        self.evaluation = EvaluateSettings(
            on=args.on, window=args.window, max_tokens=args.max_tokens, detail=args.detail, device=args.device
        )
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = args.out / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.bench: tuple[str, Bench] | None = None

    def decided(self, model: Model, form: dict[str, Any], stage: str) -> dict[str, Any]:
        """All that decides a result."""
        args, decided = self.args, {"weights": model.weights, "evaluation": self.evaluation.model_dump(), "stage": stage}
        healed = stage not in ("source", "closed")
        settings = {key: value for key, value in self.set.items() if healed or not key.startswith("heal")}
        decided |= {"form": form, "calibrate": args.calibrate, "set": settings}
        if stage == "uptrained":
            decided |= {"recipe": load_recipe(args.recipe, args.uptrain).model_dump(), "data": args.data or args.calibrate}
        return decided

    def key(self, model: Model, form: dict[str, Any], stage: str) -> str:
        return hashlib.sha256(json.dumps(self.decided(model, form, stage), sort_keys=True).encode()).hexdigest()[:16]

    def settings(self, form: dict[str, Any], stage: str) -> dict[str, Any]:
        values = {"calibrate": self.args.calibrate, "device": self.args.device, **self.set, **form}
        return values | ({"heal_steps": 0} if stage == "closed" else {})

    def make(self, model: Model, form: dict[str, Any], stage: str) -> tuple[Path, dict[str, Any]]:
        """The checkpoint of a stage, and what making it took; one that is there already took what it took then."""
        out = self.args.out / "checkpoints" / f"{model.name}-{self.key(model, form, stage)}"
        done = out / "made.json"
        if done.exists():
            return out, json.loads(done.read_text())
        shutil.rmtree(out, ignore_errors=True)  # killed before it was written what making it took
        if stage == "uptrained":
            args, before = self.args, self.make(model, form, "healed")[0]
            pairs = [*args.uptrain, f"device={args.device}"]
            made = apart(train, str(before), out, str(model.folder), args.recipe, pairs, args.data or args.calibrate)
        else:
            made = apart(fold, str(model.folder), out, self.settings(form, stage))
        done.write_text(json.dumps(made))
        return out, made

    def measure(self, model: Model, row: str, total: int, form: dict[str, Any], stage: str) -> dict[str, Any]:
        """The result of a stage, taken from what is there or made now. One that failed is tried again at the next run."""
        key = self.key(model, form, stage)
        if (found := self.results.get(key)) and (is_measured(found) or found.get("final")):
            return found
        about = {"model": model.name, "row": row, "total": total, "stage": stage, "form": form, "version": version()}
        try:
            out, made = self.make(model, form, stage)
            started = time.time()
            measured = self.bench_of(model).measure(str(out), out)
            seconds = round(time.time() - started, 1)
            decided = self.decided(model, form, stage)
            result = {**measured, **about, "made": made, "evaluation_seconds": seconds, "decided": decided}
            print(
                f"{model.name} {row} {total} {stage} {form}: {result['damage_nats']:+.4f} in {made['seconds']:.0f} s",
                flush=True,
            )
        except (UserError, ConversionError, RuntimeError) as error:  # also what a process says that was killed for its memory
            result = {**about, "error": str(error), "final": isinstance(error, NothingGained)}
            print(f"{model.name} {row} {total} {stage} {form}: {error}", flush=True)
        self.keep(key, result)
        if stage == "closed" and not self.args.keep:
            self.remove(model, form, stage)
        return result

    def bench_of(self, model: Model) -> Bench:
        """The source, loaded and measured once."""
        if self.bench is None or self.bench[0] != model.name:
            self.bench = None  # the one before makes room
            windows, device = held_out_windows(self.evaluation, model.folder), pick_device(self.args.device)
            bench = Bench(model.name, model.folder, device, self.evaluation, windows, 1, lambda share, line: None)
            self.bench = model.name, bench
            count, window = windows.ids.shape
            about = {"model": model.name, "weights": model.weights, "window": window, "tokens": count * (window - 1)}
            if (key := self.key(model, {}, "source")) not in self.results:
                self.keep(key, {**about, **bench.own})
        return self.bench[1]

    def keep(self, key: str, result: dict[str, Any]) -> None:
        self.results[key] = result
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(self.results, indent=1))
        fresh.replace(self.file)

    def remove(self, model: Model, form: dict[str, Any], stage: str) -> None:
        shutil.rmtree(self.args.out / "checkpoints" / f"{model.name}-{self.key(model, form, stage)}", ignore_errors=True)

    def run(self, model: Model, row: str, total: int) -> None:
        """One row at one budget: the closed forms, and of the best of them the other stages."""
        tried = [self.measure(model, row, total, form, "closed") for form in model.forms(row, total, self.splits)]
        if not (tried := list(filter(is_measured, tried))):
            return
        form = min(tried, key=lambda result: result["damage_nats"])["form"]
        for stage in self.stages:
            if stage != "closed":
                self.measure(model, row, total, form, stage)
        for stage in () if self.args.keep else STAGES[1:]:
            self.remove(model, form, stage)

    def found(self, model: Model) -> list[dict[str, Any]]:
        """What is there of all that is asked for, in order: of every row and budget one result for each stage."""
        chosen = []
        for row in self.rows:
            for total in model.totals(self.args.budgets):
                forms = list(model.forms(row, total, self.splits))
                tried = [self.results.get(self.key(model, form, "closed"), {}) for form in forms]
                if not (tried := list(filter(is_measured, tried))):
                    continue
                best = min(tried, key=lambda result: result["damage_nats"])
                later = [self.results.get(self.key(model, best["form"], stage), {}) for stage in STAGES[1:]]
                chosen += [best, *(result for result in later if result)]
        return chosen

    def write(self, models: list[Model]) -> str:
        """Tables and plots of what is there."""
        text = []
        for model in models:
            source, found = self.results.get(self.key(model, {}, "source")), self.found(model)
            if source is not None and found:
                text.append(real_tables.tables(source, found, model.totals(self.args.budgets), self.about(model)))
                real_tables.plot(source, found, self.args.out / f"{model.name}.png")
                if self.args.publish:
                    results.keep(model.name, [self.file], self.args.publish)
        (self.args.out / "tables.md").write_text("\n\n".join(text) + "\n")
        return "\n\n".join(text)

    def about(self, model: Model) -> str:
        spec, more = model.spec, ", ".join(f"{key}={value}" for key, value in self.set.items())
        return (
            f"{model.config['model_type']} of {spec.layers} layers with {spec.heads} query and {spec.kv_heads} key heads of "
            f"{spec.head_dim}, {model.config.get('dtype') or model.config.get('torch_dtype')} weights {model.weights[:12]}; "
            + (f"converted with {more}; " if more else "")
            + (
                f"uptrained by `{self.args.recipe}` {' '.join(self.args.uptrain)}".rstrip()
                if "uptrained" in self.stages
                else ""
            )
        ).rstrip("; ")


def is_measured(result: dict[str, Any]) -> bool:
    return "damage_nats" in result


def listed(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names separated by commas, in the order that they have in `known`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(unknown("row or stage", name, known))
    return tuple(name for name in known if name in names)


def version() -> str:
    """Of kvfold, with the commit where the benchmark lies in a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"{kvfold.__version__} ({commit})" if commit else kvfold.__version__


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--on", required=True, help="held-out text, as kvfold evaluate takes it")
    parser.add_argument("--calibrate", required=True, help="calibration text, as kvfold convert takes it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/real_models"), metavar="FOLDER")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of " + ", ".join(ROWS))
    parser.add_argument("--budgets", help=f"shares of the cache or numbers per token and layer; {SHARES}, and MHA2MLA's")
    parser.add_argument("--splits", default="0.25,0.5", help="shares of the cache that may rotate, for published ways")
    parser.add_argument("--stages", default=",".join(STAGES), help="closed is always made, to choose the split")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of kvfold convert")
    parser.add_argument("--recipe", default="distill-kl", help="of kvfold uptrain")
    parser.add_argument("--uptrain", nargs="+", default=[], metavar="KEY=VALUE", help="settings over the recipe's")
    parser.add_argument("--data", help="text to uptrain on; the calibration text where it is left out")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window of held-out text")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of held-out text")
    parser.add_argument("--detail", default="quick", choices=["damage", "quick", "normal", "full"], help="as kvfold evaluate")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--keep", action="store_true", help="keep every checkpoint; else none stays behind its row")
    parser.add_argument(
        "--publish", type=Path, nargs="?", const=results.RESULTS, metavar="FOLDER", help="keep the results there, docs/results"
    )
    parser.add_argument("--print", action="store_true", help="only write and print the tables of what is there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    try:
        benchmark = Benchmark(args)
        models = [Model(Path(name).name, fetch_checkpoint(name)) for name in args.models]
        for model in () if args.print else models:
            for total in model.totals(args.budgets):
                for row in benchmark.rows:
                    benchmark.run(model, row, total)
                    benchmark.write(models)
    except UserError as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from None
    print(benchmark.write(models))


if __name__ == "__main__":
    main()
