"""`quantkit recipes`."""

from __future__ import annotations

import click


@click.command("recipes")
@click.argument("name", required=False)
def recipes_command(name: str | None) -> None:
    """List the shipped recipes, or print the one called NAME.

    A printed recipe is a good start for one's own: save it as a .yaml file and pass its path.
    """
    from importlib import resources

    from quantkit.recipe import load_recipe, shipped_names

    if name is None:
        for shipped in shipped_names():
            click.echo(f"{shipped:12} {load_recipe(shipped).description}")
        return
    load_recipe(name)
    path = resources.files("quantkit") / "recipes" / f"{name.lower()}.yaml"
    click.echo(path.read_text("utf-8"), nl=False)
