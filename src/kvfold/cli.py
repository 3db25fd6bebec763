"""The verbs. Thin: each parses its flags, imports what it needs, calls one function and prints what came of it."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from kvfold.errors import ConversionError, Stopped, UserError, explain

GO_ON = {
    "convert": "what is finished is kept, repeat with --resume to go on",
    "uptrain": "repeat with --resume to go on from the last checkpoint",
    "evaluate": "repeat the command to go on behind the models that are measured",
}
"""After a signal."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class _Verbs(TyperGroup):
    """typer would end in silence on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as signalled:
            number = signal.SIGTERM if isinstance(signalled, _Terminated) else signal.SIGINT
            go_on = GO_ON.get(ctx.invoked_subcommand or "", "repeat the command")
            raise Stopped(f"stopped by {number.name}: {go_on}", 128 + number) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fold the KV cache of a trained Hugging Face model into a cheaper attention.",
)

Source = Annotated[str, typer.Argument(help="Local folder or Hub id of the source checkpoint.")]
Out = Annotated[Path, typer.Argument(help="Folder to write.")]
To = Annotated[str, typer.Option("--to", help="Target attention: gqa, mqa, mla, mfa or mfa-kr.")]
KvHeads = Annotated[Optional[int], typer.Option(help="Key/value heads to keep (gqa).")]
KvRank = Annotated[Optional[int], typer.Option(help="Width of the latent (mla).")]
RopeDim = Annotated[
    Optional[int], typer.Option(help="Width of the shared rotary key (mla). Default: the head width, at most 64.")
]
Width = Annotated[Optional[int], typer.Option(help="Width of the one key, and of the one value of mfa (mfa, mfa-kr).")]
QRank = Annotated[Optional[int], typer.Option(help="Rank of the queries (mla, mfa, mfa-kr). Default: full.")]
Keys = Annotated[
    Optional[str],
    typer.Option(help="absorbed, or rebuilt: mla without rotary key, milder, but decoding rebuilds all keys at every step."),
]
LayerBudgets = Annotated[
    Optional[str],
    typer.Option(help="uniform, or measured: the same total, more where a layer needs it (mla, mfa, mfa-kr)."),
]
LayoutOption = Annotated[
    Optional[str],
    typer.Option(
        "--layout",
        help="auto, deepseek_v3 (mla), step3_text (mfa, vLLM only) or kvfold. Default: what transformers runs, stock first.",
    ),
]
PadFor = Annotated[
    Optional[str],
    typer.Option(help="Zero-pad mla for an engine's kernels: vllm, vllm-cpu or none. Default: where the cache does not grow."),
]
KvBudget = Annotated[
    Optional[str], typer.Option(help="Share of the source's cache to keep, 25% or 0.25, in place of the target's widths.")
]
Method = Annotated[
    Optional[str],
    typer.Option(
        help="mean, first, random, align or pca. Default: pca with calibration text, align without. For mla: kvfold, or for "
        "comparison svd-split, svd-joint, partial-rope-high, -low, -uniform, -2norm, rorope, whitened. Default: kvfold."
    ),
]
Grouping = Annotated[
    Optional[str], typer.Option(help="Which heads share one: neighbours or similar. Default: similar for align and pca.")
]
GEOMETRY = "to kv_heads kv_rank rope_dim width q_rank keys layer_budgets layout pad_for kv_budget method"
Dtype = Annotated[Optional[str], typer.Option(help="float32, bfloat16 or float16. Default: as the source.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the result there as JSON; - for standard output.")]


@app.command()
def plan(
    source: Source,
    to: To,
    kv_heads: KvHeads = None,
    kv_rank: KvRank = None,
    rope_dim: RopeDim = None,
    width: Width = None,
    q_rank: QRank = None,
    keys: Keys = None,
    layer_budgets: LayerBudgets = None,
    layout: LayoutOption = None,
    pad_for: PadFor = None,
    kv_budget: KvBudget = None,
    method: Method = None,
    calibrate: Annotated[Optional[str], typer.Option(help="Calibration text, as in convert.")] = None,
    dtype: Dtype = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the cache table.")] = 1,
    revision: Revision = None,
    json_path: Json = None,
) -> None:
    """What would change: geometry, cache, parameters, refusals. Reads config.json only."""
    from kvfold.convert.plan import cache_dtype, count_parameters, make_plan
    from kvfold.convert.settings import ConvertSettings, parse_settings
    from kvfold.convert.source import fetch_config

    settings = parse_settings(
        ConvertSettings,
        _given(
            locals(),
            GEOMETRY + " calibrate dtype revision",
        ),
    )
    config = fetch_config(source, revision)
    made = make_plan(config, settings)
    record = made.record(batch, cache_dtype(config, settings), count_parameters(config))
    _write_json(json_path, record)
    if json_path != Path("-"):
        _print_plan(record)
    made.refuse()


@app.command()
def convert(
    source: Source,
    out: Out,
    to: Annotated[Optional[str], typer.Option("--to", help="Target attention: gqa, mqa, mla, mfa or mfa-kr.")] = None,
    kv_heads: KvHeads = None,
    kv_rank: KvRank = None,
    rope_dim: RopeDim = None,
    width: Width = None,
    q_rank: QRank = None,
    keys: Keys = None,
    layer_budgets: LayerBudgets = None,
    layout: LayoutOption = None,
    pad_for: PadFor = None,
    kv_budget: KvBudget = None,
    method: Method = None,
    grouping: Grouping = None,
    calibrate: Annotated[
        Optional[str],
        typer.Option(
            help="Text file, folder, Hub dataset name[:config[:split[:column]]], tokens file.safetensors:name, "
            "or self[:tokens] to let the source write it."
        ),
    ] = None,
    calibration_tokens: Annotated[Optional[int], typer.Option(help="Tokens to take from it. Default: 131072.")] = None,
    window: Annotated[Optional[int], typer.Option(help="Tokens in a window of calibration text. Default: 512.")] = None,
    token_weights: Annotated[
        Optional[str],
        typer.Option(help="How much a calibration token counts: uniform, or nll, what the source finds surprising."),
    ] = None,
    heal_steps: Annotated[
        Optional[int], typer.Option(help="Healing steps, of all layers or of each window; 0 turns it off. Default: 300.")
    ] = None,
    heal_window: Annotated[
        Optional[str],
        typer.Option(help="Layers healed together, a number or all. Default: all where the model fits into memory, else 2."),
    ] = None,
    heal_batch_tokens: Annotated[Optional[int], typer.Option(help="Tokens in a healing step. Default: 4096.")] = None,
    heal_lr: Annotated[
        Optional[float],
        typer.Option(help="Healing step relative to a parameter's RMS. Default: 0.1/√d for all layers, 0.02 for windows."),
    ] = None,
    heal_dtype: Annotated[
        Optional[str], typer.Option(help="Matrix products of healing: bfloat16 or float32. Default: bfloat16.")
    ] = None,
    dtype: Dtype = None,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    max_shard_size: Annotated[Optional[str], typer.Option(help="Size of a weight file, 5GB or 500MiB. Default: 5GB.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Default: 0.")] = None,
    revision: Revision = None,
    settings_file: Annotated[
        Optional[Path], typer.Option("--settings", help="YAML or JSON with settings, or a kvfold.json; flags override it.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with OUT.partial where it was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it exists.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare what is written with what was folded before OUT is there."),
    ] = True,
    json_path: Json = None,
) -> None:
    """Fold a checkpoint into another one with a smaller KV cache."""
    flags = _given(
        locals(),
        GEOMETRY + " grouping calibrate calibration_tokens window token_weights heal_steps "
        "heal_window heal_batch_tokens heal_lr heal_dtype dtype device max_shard_size seed revision",
    )
    from kvfold.convert.escape import visible
    from kvfold.convert.pipeline import convert as run
    from kvfold.convert.settings import ConvertSettings, parse_settings

    settings = parse_settings(ConvertSettings, {**_read_settings(settings_file), **flags})
    with _progress(f"{source} → {out}") as report:
        done = run(source, out, settings, resume, overwrite, report, verify)
    _write_json(json_path, done.record)
    if json_path != Path("-"):
        print(
            f"{visible(out)}: {done.record['cache_numbers_per_token_per_layer']} numbers per token per layer, "
            f"{done.record['kv_budget']:.1%} of the source's cache, in {done.record['seconds']:.0f} s"
        )
        _print_left(done.left)


@app.command()
def evaluate(
    out: Annotated[list[str], typer.Argument(help="Folded checkpoints: local folders or Hub ids.")],
    on: Annotated[str, typer.Option(help="Held-out text or tokens, as --calibrate of convert takes them.")],
    against: Annotated[Optional[str], typer.Option(help="The source. Default: what kvfold.json names.")] = None,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on, from the beginning.")] = 65536,
    batch: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 8,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")] = "float32",
    damage_only: Annotated[
        bool, typer.Option("--damage-only", help="Leave answers, retrieval and decoding speed out.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Sample answers, retrieval and decoding speed coarsely.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Sample them finely, and decode up to the model's last position.")
    ] = False,
    tasks: Annotated[
        Optional[str], typer.Option(help="Benchmarks of lm-eval, arc_easy,hellaswag,…; needs kvfold[tasks].")
    ] = None,
    include_path: Annotated[Optional[str], typer.Option(help="Folder with task files of your own for --tasks.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Documents of each task. Default: all.")] = None,
    report_dir: Annotated[
        Optional[Path], typer.Option("--report", help="Folder for the report. Default: the first OUT.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Measure what folding cost and what it saved. Runs under `accelerate launch` too."""
    from kvfold.convert.settings import normal_dtype, parse_settings
    from kvfold.evaluation import report as reports
    from kvfold.evaluation.evaluate import EvaluateSettings
    from kvfold.evaluation.evaluate import evaluate as run
    from kvfold.evaluation.parallel import state

    if dtype != "auto":
        normal_dtype(dtype)
    asked = [name for name, given in (("damage", damage_only), ("quick", quick), ("full", full)) if given]
    if len(asked) > 1:
        raise UserError("--damage-only, --quick and --full exclude each other: give one of them")
    values = _given(locals(), "on window max_tokens batch device dtype include_path limit")
    values["detail"] = (asked or ["normal"])[0]
    if tasks is not None:
        values["tasks"] = _listed("--tasks", tasks)
    settings = parse_settings(EvaluateSettings, values)
    folder = report_dir or (Path(out[0]) if Path(out[0]).is_dir() else Path("."))
    with _progress("evaluating") as report:
        result = run(out, against, settings, report, folder)
    if not state().is_main_process:
        return
    paths = reports.write(result, folder)
    _write_json(json_path, result)
    if json_path != Path("-"):
        _print_report(result)
        print("report:", ", ".join(map(str, paths)))
        if len(paths) < 3:
            print("no report.html: it needs matplotlib (pip install 'kvfold[plots]')")


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="Folded checkpoint.")],
    repo: Annotated[str, typer.Argument(help="Where it shall lie on the Hub, user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to write to; made when it is not there.")] = None,
    licence: Annotated[
        Optional[str], typer.Option("--license", help="As the Hub writes it. Default: what the source's card states.")
    ] = None,
    base_model: Annotated[
        Optional[str], typer.Option(help="Hub id of the source, when it was folded from a local folder.")
    ] = None,
    report_dir: Annotated[Optional[Path], typer.Option("--report", help="Folder of the report. Default: OUT.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the card, list the files, upload nothing.")] = False,
) -> None:
    """Write the model card with the measured results, and upload the folder."""
    from kvfold.convert import card, hub
    from kvfold.evaluation import report as reports

    hub.refuse_name(repo)
    record = card.read_record(out)
    report, model, plot = reports.for_card(report_dir or out, out)
    source = str(record["source"])
    if base_model is not None:
        hub.refuse_name(base_model)
    elif not Path(source).exists() and hub.is_name(source):
        base_model = source
    facts = card.Facts(
        out=out,
        repo_id=repo,
        base_model=base_model,
        licence=card.Licence(licence) if licence else hub.licence_of(out, source, base_model),
        report=report,
        model=model,
        table=reports.markdown({**report, "models": [model]}),
        legend=reports.LEGEND,
        plot=plot,
    )
    ours = card.read_card(out / card.CARD)
    theirs = None if dry_run else hub.card_on_hub(repo, revision)
    text = card.make_card(facts, card.newer_of(ours, theirs, out))
    if dry_run:
        (out / card.CARD).write_text(text, encoding="utf-8")
        uploaded, left = hub.files_of(out)
        for name in uploaded:
            print(f"{(out / name).stat().st_size:>15,}  {name}")
        _print_left(left)
        print(f"nothing was uploaded; {out / card.CARD} is written")
    else:
        print(hub.push(out, repo, text, private, revision))


@app.command()
def gguf(
    out: Annotated[Path, typer.Argument(help="Folded checkpoint in the deepseek_v3 layout.")],
    file: Annotated[Path, typer.Argument(help="File to write, .gguf.")],
    pre: Annotated[
        Optional[str], typer.Option(help="llama.cpp's name for the pre-tokenizer. Default: known from tokenizer.json.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace FILE if it exists.")] = False,
) -> None:
    """Write an MLA checkpoint as a GGUF file for llama.cpp."""
    from kvfold.convert.gguf import write_gguf

    with _progress(f"{out} → {file}") as report:
        write_gguf(out, file, pre, overwrite, report)
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


@app.command()
def uptrain(
    out: Annotated[str, typer.Argument(help="The folded checkpoint: local folder or Hub id.")],
    healed: Annotated[Path, typer.Argument(help="Folder to write.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings over the recipe's, as key=value.")] = None,
    recipe: Annotated[str, typer.Option(help="A name that `kvfold recipes` lists, or a .yaml file.")] = "distill-lora",
    data: Annotated[str, typer.Option(help="Text or tokens to train on, as --calibrate of convert; several with commas.")] = "",
    held_out: Annotated[
        Optional[str], typer.Option("--eval", help="Text to choose the best checkpoint by. Default: a share of the data.")
    ] = None,
    teacher: Annotated[Optional[str], typer.Option(help="The source. Default: what kvfold.json names.")] = None,
    keep_adapter: Annotated[bool, typer.Option(help="Write a PEFT adapter of OUT instead of a merged checkpoint.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with HEALED.partial where it was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace HEALED if it exists.")] = False,
    json_path: Json = None,
) -> None:
    """Train a folded checkpoint end to end against its source. Also under `accelerate launch -m kvfold`."""
    from kvfold.recipes.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    if not data:
        raise UserError("--data is missing: give a text, a folder, a Hub dataset or tokens to train on")
    from kvfold.recipes.uptrain import uptrain as run

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    entry = run(out, healed, teacher, settings, data, held_out, keep_adapter, resume, overwrite, log)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first tells
        return
    _write_json(json_path, entry)
    if json_path != Path("-"):
        loss = entry["held_out_loss"]
        print(
            f"{healed}: held-out loss {loss['before']:.4f} → {loss['after']:.4f} nats per token, "
            f"{entry['tokens']:,} tokens in {entry['seconds']:.0f} s"
        )


recipes = typer.Typer(add_completion=False, help="List, show and copy the recipes of uptrain.")
app.add_typer(recipes, name="recipes")


@recipes.callback(invoke_without_command=True)
def _list_recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from kvfold.recipes.recipe import headline, shipped

        for name, path in shipped().items():
            print(f"{name:20}{headline(path)}")


@recipes.command("show")
def _show_recipe(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe."""
    from kvfold.recipes.recipe import recipe_file

    print(recipe_file(name).read_text(), end="")


@recipes.command("copy")
def _copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    path: Annotated[Optional[Path], typer.Argument(help="File to write. Default: NAME.yaml.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
) -> None:
    """Write a recipe to a file, to change it and give it to --recipe."""
    from kvfold.recipes.recipe import recipe_file

    text, path = recipe_file(name).read_text(), path or Path(f"{name}.yaml")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another name, or pass --overwrite to replace it")
    path.write_text(text)
    print(path)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Folder for the checkpoints and the report.")] = Path("kvfold-demo"),
) -> None:
    """Fold the shipped demo model in several ways and show the damage. A few minutes on two cores."""
    from kvfold.recipes.demo.demo import run_demo

    with _progress("demo") as report:
        result = run_demo(directory, report)
    _print_report(result)
    page = directory / "report.html"
    print("report:", page if page.exists() else directory / "report.md")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from kvfold import __version__

        print(f"kvfold {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run a verb. Exit 2 for what the user got wrong, 1 for what failed, 130 and 143 for a stop by Ctrl-C and SIGTERM, with
    one line on standard error. `KVFOLD_TRACEBACK=1` shows where what nobody foresaw came from."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what no encoding does

    def terminate(*_: Any) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        app(standalone_mode=True)
        sys.exit(0)
    except UserError as error:
        _fail(str(error), 2)
    except ConversionError as error:
        _fail(str(error), 1)
    except Stopped as stopped:
        _fail(str(stopped), stopped.code)
    except KeyboardInterrupt:
        _fail("stopped: repeat the command", 130)
    except OSError as error:
        _fail(explain(error), 1)
    except Exception as error:
        if os.environ.get("KVFOLD_TRACEBACK"):
            raise
        _fail(_unforeseen(error), 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _unforeseen(error: Exception) -> str:
    """One line on an exception that no part of kvfold expected, and how to report it."""
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(str(error).split())[:300]
    return (
        f"unforeseen {type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {what}; that is a fault of "
        "kvfold: please report this line, the command and what it shows with KVFOLD_TRACEBACK=1 before it"
    )


def _fail(message: str, code: int) -> NoReturn:
    from kvfold.convert.escape import visible

    print("kvfold: " + visible(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


def _given(values: dict[str, Any], names: str) -> dict[str, Any]:
    """The flags among `names` that were given."""
    return {name: values[name] for name in names.split() if values[name] is not None}


def _listed(flag: str, text: str) -> list[str]:
    names = [name for part in text.split(",") if (name := part.strip())]
    if not names:
        raise UserError(f"{flag} is empty: name one or more, separated by commas")
    return names


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    from kvfold.convert.settings import parse_yaml

    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8"), f"--settings {path}")
    except (OSError, ValueError) as error:
        raise UserError(f"--settings {path} cannot be read: {' '.join(str(error).split())}") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("settings", loaded)  # a kvfold.json keeps them one level down
    if not isinstance(loaded, dict):
        raise UserError(f"--settings {path} holds no settings: write `name: value` lines")
    return loaded


def _print_left(names: list[str]) -> None:
    """Say in one line which files stay where they are."""
    from kvfold.convert.escape import visible

    if names:
        more = f" and {len(names) - 5} more" * (len(names) > 5)
        print(f"left behind, not known to belong to a checkpoint: {', '.join(map(visible, names[:5]))}{more}")


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        text = json.dumps(data, indent=2) + "\n"
        sys.stdout.write(text) if path == Path("-") else path.write_text(text)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float | None, str], None]]:
    """A bar on standard error that takes the share done and a line on what is going on, or a line to print above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=1.0)

        def report(share: float | None, line: str) -> None:
            if share is None:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                progress.update(task, completed=share, description=line)

        yield report


def _print_report(result: dict[str, Any]) -> None:
    from rich.console import Console

    from kvfold.evaluation import report as reports

    # into a pipe or a file the table must not be squeezed into 80 columns
    Console(width=None if sys.stdout.isatty() else 110).print(reports.table(result))


def _print_plan(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    source, target = record["source"], record["target"]
    out = Table(title=f"{source['model_type']} → {target['to']} ({target['method']}), cache in {record['cache_dtype']}")
    for name in ("", "source", "target"):
        out.add_column(name, justify="right" if name else "left")
    numbers, size = record["cache_numbers_per_token_per_layer"], record["cache_bytes_per_token"]
    bound = "at most " * target["parameters_are_a_bound"]
    lines: list[tuple[str, Any, Any]] = [
        ("query heads", source["heads"], source["heads"]),
        ("key/value heads", source["kv_heads"], target.get("kv_heads", "–")),
        ("latent + shared key", "–", f"{target['kv_rank']} + {target['rope_dim']}" if "kv_rank" in target else "–"),
        ("head width", source["head_dim"], source["head_dim"]),
        ("architecture", source["architecture"], target["architecture"]),
        ("parameters", f"{source['parameters']:,}", bound + f"{target['parameters']:,}"),
        ("cached numbers / token / layer", numbers["source"], numbers["target"]),
        ("cached bytes / token", f"{size['source']:,}", f"{size['target']:,}"),
    ]
    for row in record["cache_bytes"]:
        before, after = (f"{row[side] / 2**30:,.2f} GiB" for side in ("source", "target"))
        beyond = " *" * (row["context"] > source["max_positions"])
        lines.append((f"cache at {row['context']:,} × {row['batch']}{beyond}", before, after))
    if source["sliding_window"]:
        layers = source["layers"] - source["full_layers"]
        lines.append(("sliding window", f"{source['sliding_window']:,} tokens", f"{layers} of {source['layers']} layers"))
    lines.append(("KV budget", "100%", f"{record['kv_budget']:.1%}"))
    for name, before, after in lines:
        out.add_row(name, str(before), str(after))
    notes = [target.get("note")]
    if record["cache_bytes"][-1]["context"] > source["max_positions"]:
        notes.append(f"* more than the {source['max_positions']:,} positions that the source was made for")
    out.caption = "\n".join(filter(None, notes))
    Console().print(out)
