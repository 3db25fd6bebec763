"""The verbs. Thin: each takes its flags, imports what it needs, calls one function and prints what came of it."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from kvfold import console
from kvfold.allocator import hold_memory
from kvfold.convert.planning.settings import ConvertSettings, parse_settings, read_settings
from kvfold.errors import UserError
from kvfold.evaluation.settings import EvaluateSettings
from kvfold.options import takes
from kvfold.recipe_verbs import recipes
from kvfold.recipes.recipe import Recipe, load_recipe

app = typer.Typer(
    cls=console.Verbs,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fold the KV cache of a trained Hugging Face model into a cheaper attention.",
)

app.add_typer(recipes, name="recipes")

Source = Annotated[str, typer.Argument(help="Local folder or Hub id of the source checkpoint.")]
Json = Annotated[Optional[Path], typer.Option("--json", help="Also write the result there as JSON; - for standard output.")]
FLOPS = "What it takes on a device that is not here, from its bfloat16 operations per second."


@app.command(epilog="Example: kvfold plan meta-llama/Llama-2-7b-hf --to mla --kv-budget 25%")
@takes(ConvertSettings)
def plan(
    source: Source,
    flags: dict[str, Any],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the cache table.")] = 1,
    device_flops: Annotated[Optional[float], typer.Option(min=1, help=FLOPS)] = None,
    json_path: Json = None,
) -> None:
    """What would change: geometry, cache, parameters, refusals; with --device also what it takes. Reads config.json only."""
    settings = parse_settings(ConvertSettings, flags)
    if "device" in flags:  # its speed is measured with memory as a conversion has it
        hold_memory()
    from kvfold.convert.planning.told import tell

    made, record = tell(source, settings, batch, "device" in flags or device_flops is not None, device_flops)
    if console.in_words(json_path, record):
        console.print_plan(record)
    made.refuse()


@app.command(epilog="Example: kvfold families --json -")
def families(json_path: Json = None) -> None:
    """What is known, and what each family can be folded into."""
    from kvfold.convert.planning.listing import known

    found = known()
    if console.in_words(json_path, found):
        console.print_families(found)


@app.command(epilog="Example: kvfold convert meta-llama/Llama-2-7b-hf llama-mla --to mla --kv-budget 25% --calibrate text.txt")
@takes(ConvertSettings)
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    flags: dict[str, Any],
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
    """Fold a checkpoint into another one with a smaller KV cache. Also under `accelerate launch -m kvfold`."""
    settings = parse_settings(ConvertSettings, {**read_settings(settings_file), **flags})
    if settings.calibrate:  # without it a layer at a time is all that is held
        hold_memory()
    from kvfold.convert import processes
    from kvfold.convert.pipeline import convert as run

    with console.progress(f"{source} → {out}") as report:
        done = run(source, out, settings, resume, overwrite, report, verify)
    processes.part()
    if not console.is_first():
        return
    if console.in_words(json_path, done.record):
        console.print_folded(out, done)


@app.command(epilog="Example: kvfold evaluate llama-mla --on Salesforce/wikitext:wikitext-2-raw-v1:test")
@takes(EvaluateSettings)
def evaluate(
    out: Annotated[list[str], typer.Argument(help="Folded checkpoints: local folders or Hub ids.")],
    flags: dict[str, Any],
    against: Annotated[Optional[str], typer.Option(help="The source. Default: what kvfold.json names.")] = None,
    damage_only: Annotated[bool, typer.Option("--damage-only", help="The same as --detail damage.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --detail quick.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The same as --detail full.")] = False,
    report_dir: Annotated[
        Optional[Path], typer.Option("--report", help="Folder for the report. Default: the first OUT.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Measure what folding cost and what it saved. Runs under `accelerate launch` too."""
    asked = [name for name, given in (("damage", damage_only), ("quick", quick), ("full", full)) if given]
    if len(asked) + ("detail" in flags) > 1:
        raise UserError("--damage-only, --quick, --full and --detail exclude each other: give one of them")
    settings = parse_settings(EvaluateSettings, {**flags, **({"detail": asked[0]} if asked else {})})
    hold_memory()
    from kvfold.convert import processes
    from kvfold.evaluation import report as reports
    from kvfold.evaluation.evaluate import evaluate as run

    folder = report_dir or (Path(out[0]) if Path(out[0]).is_dir() else Path("."))
    with console.progress("evaluating") as report:
        result = run(out, against, settings, report, folder)
    processes.part()
    if not console.is_first():
        return
    paths = reports.write(result, folder)
    if console.in_words(json_path, result):
        console.print_report(result)
        print("report:", ", ".join(map(str, paths)))
        if len(paths) < 3:
            print("no report.html: it needs matplotlib (pip install 'kvfold[plots]')")


@app.command(epilog="Example: kvfold push llama-mla user/llama-mla --private --dry-run")
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
    from kvfold.convert.publishing import card, hub
    from kvfold.publish import facts_for

    hub.refuse_name(repo)
    facts = facts_for(out, repo, report_dir or out, licence, base_model)
    hub.refuse_code(out)
    ours, theirs = card.read_card(out / card.CARD), None if dry_run else hub.card_on_hub(repo, revision)
    text = card.make_card(facts, card.newer_of(ours, theirs, out))
    if not dry_run:
        print(hub.push(out, repo, text, private, revision))
        return
    (out / card.CARD).write_text(text, encoding="utf-8")
    uploaded, left = hub.files_of(out)
    for name in uploaded:
        print(f"{(out / name).stat().st_size:>15,}  {name}")
    console.print_left(left)
    print(f"nothing was uploaded; {out / card.CARD} is written")


@app.command(epilog="Example: kvfold gguf llama-mla llama-mla.gguf")
def gguf(
    out: Annotated[Path, typer.Argument(help="Folded checkpoint in the deepseek_v3 layout.")],
    file: Annotated[Path, typer.Argument(help="File to write, .gguf.")],
    pre: Annotated[
        Optional[str], typer.Option(help="llama.cpp's name for the pre-tokenizer. Default: known from tokenizer.json.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace FILE if it exists.")] = False,
) -> None:
    """Write an MLA checkpoint as a GGUF file for llama.cpp."""
    from kvfold.convert.publishing.gguf import write_gguf

    with console.progress(f"{out} → {file}") as report:
        write_gguf(out, file, pre, overwrite, report)
    print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB")


@app.command(epilog="Example: kvfold uptrain llama-mla healed --data text.txt --tokens 1_000_000")
@takes(Recipe)
def uptrain(
    out: Annotated[str, typer.Argument(help="The folded checkpoint: local folder or Hub id.")],
    healed: Annotated[Path, typer.Argument(help="Folder to write.")],
    flags: dict[str, Any],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="Settings over the recipe's, also as key=value.")] = None,
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
    """Train a folded checkpoint end to end against its source, by a recipe; its settings can be given as flags.

    Also under `accelerate launch -m kvfold`."""
    settings = load_recipe(recipe, [*(overrides or []), *(f"{name}={value}" for name, value in flags.items())])
    if not data:
        raise UserError("--data is missing: give a text, a folder, a Hub dataset or tokens to train on")
    hold_memory()
    from kvfold.recipes.uptrain import uptrain as run

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    entry = run(out, healed, teacher, settings, data, held_out, keep_adapter, resume, overwrite, log)
    if not console.is_first():
        return
    if console.in_words(json_path, entry):
        console.print_uptrained(healed, entry)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Folder for the checkpoints and the report.")] = Path("kvfold-demo"),
) -> None:
    """Fold the shipped demo model in several ways and show the damage. A quarter of an hour on a core."""
    hold_memory()
    from kvfold.recipes.demo.demo import run_demo

    with console.progress("demo") as report:
        result = run_demo(directory, report)
    console.print_report(result)
    page = directory / "report.html"
    print("report:", page if page.exists() else directory / "report.md")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        from kvfold import __version__

        print(f"kvfold {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    console.run(app)
