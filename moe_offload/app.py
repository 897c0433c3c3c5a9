"""The command line's root: `commands.py` and `measuring_commands.py` add to it, in this order."""

from typing import Annotated

import typer

from moe_offload import __version__

app = typer.Typer(
    help="Run Hugging Face Mixture-of-Experts models on the servers people already have.",
    epilog="Try it: moe-offload generate demo -p 'def main():'",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-offload {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass
