"""What the verbs show: a progress bar, tables, JSON, and one line for whatever went wrong."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from typer import BadParameter
from typer.core import TyperGroup

from kvfold.errors import ConversionError, Stopped, UserError, explain

if TYPE_CHECKING:
    from kvfold.convert.pipeline import Converted

BYTES = {
    "disk": "disk",
    "scratch": "beside it while healing",
    "working": "memory for a layer",
    "states": "for the calibration text's hidden states",
    "healing": "for healing",
}
"""What a conversion takes, in the order in which it is told."""
FlagError: Any = BadParameter.__mro__[2]
"""click's, which newer versions of typer have within themselves: what is wrong with a command line."""
GO_ON = {
    "convert": "what is finished is kept, repeat with --resume to go on",
    "uptrain": "repeat with --resume to go on from the last checkpoint",
    "evaluate": "repeat the command to go on behind the models that are measured",
}
"""After a signal."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class Verbs(TyperGroup):
    """typer would end in silence on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as signalled:
            number = signal.SIGTERM if isinstance(signalled, _Terminated) else signal.SIGINT
            go_on = GO_ON.get(ctx.invoked_subcommand or "", "repeat the command")
            raise Stopped(f"stopped by {number.name}: {go_on}", 128 + number) from None


def run(app: Callable[..., Any]) -> NoReturn:
    """Run a verb. Exit 2 for what the user got wrong, 1 for what failed, 130 and 143 for a stop by Ctrl-C and SIGTERM, with
    one line on standard error. `KVFOLD_TRACEBACK=1` shows where what nobody foresaw came from."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what no encoding does

    def terminate(*_: Any) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except FlagError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        _fail(error.format_message(), 2)
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
    from kvfold.convert.publishing.escape import visible

    print("kvfold: " + visible(" ".join(message.split())), file=sys.stderr)
    sys.exit(code)


def is_first() -> bool:
    """Whether this process tells what several of them do, as `accelerate launch` numbers them."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(title: str) -> Iterator[Callable[[float | None, str], None]]:
    """A bar on standard error that takes the share done and a line on what is going on, or a line to print above it."""
    if not is_first():
        yield lambda share, line: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def report(share: float | None, line: str) -> None:
            if share is None:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                bar.update(task, completed=share, description=line)

        yield report


def print_left(names: list[str]) -> None:
    """Say in one line which files stay where they are."""
    from kvfold.convert.publishing.escape import visible

    if names:
        more = f" and {len(names) - 5} more" * (len(names) > 5)
        print(f"left behind, not known to belong to a checkpoint: {', '.join(map(visible, names[:5]))}{more}")


def in_words(path: Path | None, data: dict[str, Any]) -> bool:
    """Write `data` as JSON to a file, to standard output for `-`, nowhere for None. Whether the verb shall say it in words,
    too, which it does not where standard output has the JSON."""
    if path is not None:
        text = json.dumps(data, indent=2) + "\n"
        sys.stdout.write(text) if path == Path("-") else path.write_text(text)
    return path != Path("-")


def print_folded(out: Path, done: "Converted") -> None:
    from kvfold.convert.publishing.escape import visible

    record = done.record
    print(
        f"{visible(out)}: {record['cache_numbers_per_token_per_layer']:g} numbers per token per layer, "
        f"{record['kv_budget']:.1%} of the source's cache, in {record['seconds']:.0f} s"
    )
    print_left(done.left)
    for note in done.notes:
        print(visible(note))


def print_uptrained(healed: Path, entry: dict[str, Any]) -> None:
    loss = entry["held_out_loss"]
    print(
        f"{healed}: held-out loss {loss['before']:.4f} → {loss['after']:.4f} nats per token, "
        f"{entry['tokens']:,} tokens in {entry['seconds']:.0f} s"
    )


def print_report(result: dict[str, Any]) -> None:
    from rich.console import Console

    from kvfold.evaluation import report as reports

    # into a pipe or a file the table must not be squeezed into 80 columns
    Console(width=None if sys.stdout.isatty() else 110).print(reports.table(result))


def print_families(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    targets = list(dict.fromkeys(target for family in found["families"] for target in family["targets"]))
    out = Table(title="families, and the layout of each target")
    for name in ("model_type", "class", *targets):
        out.add_column(name)
    for family in found["families"]:
        row = (family["targets"].get(target, "–") for target in targets)
        out.add_row(family["model_type"], family["architecture"], *row)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(out)
    read = ", ".join(f"{each['model_type']} as {each['read_as']}" for each in found["translations"])
    print(f"read as another: {read}")
    whole, alone = (
        [each["model_type"] for each in found["parts"] if bool(each["whole"]) is is_whole] for is_whole in (True, False)
    )
    print(f"models of several parts, left whole by gqa and mqa: {', '.join(whole)}")
    print(f"and of which the language model alone is written (--part language): {', '.join(alone)}")


def print_plan(record: dict[str, Any]) -> None:
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
        ("cached numbers / token / layer", numbers["source"], f"{numbers['target']:g}"),
        ("cached bytes / token", f"{size['source']:,}", f"{size['target']:,}"),
    ]
    for row in record["cache_bytes"]:
        before, after = (f"{row[side] / 2**30:,.2f} GiB" for side in ("source", "target"))
        beyond = " *" * (row["context"] > source["max_positions"])
        lines.append((f"cache at {row['context']:,} × {row['batch']}{beyond}", before, after))
    if source["sliding_window"]:
        layers = source["layers"] - source["full_layers"]
        lines.append(("sliding window", f"{source['sliding_window']:,} tokens", f"{layers} of {source['layers']} layers"))
    if (folded := target.get("folded_layers")) is not None:
        lines.append(("folded layers", f"{source['layers']} layers", f"{len(folded)}: {', '.join(map(str, folded))}"))
    lines.append(("KV budget", "100%", f"{record['kv_budget']:.1%}"))
    for name, before, after in lines:
        out.add_row(name, str(before), str(after))
    notes = [target.get("note")]
    if record["cache_bytes"][-1]["context"] > source["max_positions"]:
        notes.append(f"* more than the {source['max_positions']:,} positions that the source was made for")
    out.caption = "\n".join(filter(None, notes))
    Console().print(out)
    if "cost" in record:
        Console().print(_cost(record["cost"]))


def _cost(cost: dict[str, Any]) -> Any:
    """What the conversion takes, as a table."""
    from rich.table import Table

    from kvfold.convert.duration import spoken

    out = Table(title=f"what it takes on {cost['device']}, about")
    for name in ("", "operations", "time"):
        out.add_column(name, justify="right" if name else "left")
    for name, step in [*cost["steps"].items(), ("in all", cost)]:
        out.add_row(name, f"{step['operations']:.1e}", spoken(step["seconds"]))
    sizes = [f"{text} {cost['bytes'][name] / 2**30:,.1f} GiB" for name, text in BYTES.items() if name in cost["bytes"]]
    out.caption = f"{', '.join(sizes)}; reading and writing files is not counted"
    return out
