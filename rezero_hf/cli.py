"""How every script starts: typer reads the arguments, and a user's mistake ends in one line instead of a traceback."""

import functools
import sys
from collections.abc import Callable

import typer

from .errors import UserError


def run(main: Callable) -> None:
    """Run a script's `main`, its arguments taken from the command line by their annotations.

    A `UserError` is printed as one line on stderr and ends the process with status 2.
    """

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(2)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=sys.modules[main.__module__].__doc__)(guarded)
    app()
