"""`kvfold recipes`: list, show and copy the recipes of uptrain."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.errors import UserError
from kvfold.recipes.recipe import headline, recipe_file, shipped

recipes = typer.Typer(help="List, show and copy the recipes of uptrain.")


@recipes.callback(invoke_without_command=True)
def _list_recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        for name, path in shipped().items():
            print(f"{name:20}{headline(path)}")


@recipes.command("show")
def _show_recipe(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe."""
    print(recipe_file(name).read_text(), end="")


@recipes.command("copy")
def _copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    path: Annotated[Path | None, typer.Argument(help="File to write. Default: NAME.yaml.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file if it exists.")] = False,
) -> None:
    """Write a recipe to a file, to change it and give it to --recipe."""
    text, path = recipe_file(name).read_text(), path or Path(f"{name}.yaml")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another name, or pass --overwrite to replace it")
    path.write_text(text)
    print(path)
