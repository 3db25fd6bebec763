"""Options of the command line made from settings models, where their names, types, choices, defaults and help stand."""

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.markup import escape

WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false"}
Verb = Callable[..., None]


def takes(model: type[BaseModel], *names: str) -> Callable[[Verb], Verb]:
    """Give a verb an option for every field of `model`, or for those named.

    The verb has a parameter `flags`: those that were given, as they were written. The model checks and converts them.
    """
    fields = {n: f for n, f in model.model_fields.items() if n in (names or model.model_fields)}

    def decorate(verb: Verb) -> Verb:
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(verb).parameters.values() if p.name != "flags"]

        @wraps(verb)
        def run(**given: Any) -> None:
            flags = {name: value for name in fields if (value := given.pop(name)) is not None}
            verb(**given, flags=flags)

        made = [Parameter(n, Parameter.KEYWORD_ONLY, default=None, annotation=_option(n, f)) for n, f in fields.items()]
        run.__signature__ = signature(verb).replace(parameters=[*own, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _option(name: str, field: FieldInfo) -> Any:
    extra = field.json_schema_extra
    panel = extra.get("panel") if isinstance(extra, dict) else None
    default = "" if field.is_required() or field.default in (None, []) else f" Default: {field.default}."
    shape = "|".join(dict.fromkeys(_words(field.annotation)))
    return Annotated[
        str | None,
        typer.Option(
            "--" + name.replace("_", "-"),
            help=escape((field.description or "") + default),
            metavar=shape,
            rich_help_panel=str(panel) if panel else None,
        ),
    ]


def _words(kind: Any) -> Iterator[str]:
    """What may be written for a type: its choices, or a word for it."""
    origin = get_origin(kind)
    if origin is Literal:
        yield from map(str, get_args(kind))
    elif origin is Annotated or origin is list:
        yield from _words(get_args(kind)[0])
    elif origin in (Union, UnionType):
        for part in get_args(kind):
            yield from _words(part)
    elif kind is not NoneType:
        yield WORDS[kind]
