"""The command line: one file per command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import escort
from escort.cli import bench, cache, convert, demo, doctor, forecast, plan, prune, run
from escort.cli.console import BAD_INPUT, fail

#: A command line that no command takes. Typer has it from click or brings it, depending on the version.
_UsageError: Any = typer.BadParameter.__bases__[0]


class _Commands(TyperGroup):
    """The commands. What none of them takes is an error like any other: a printable line, with its remedy."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        if not args:  # which shows the help, by an error of its own
            return super().make_context(info_name, args, *rest, **extra)
        with _in_one_line():
            return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "escort"
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        fail(f"{message}; see {command} --help", BAD_INPUT)


app = typer.Typer(
    cls=_Commands,
    help="Run pruned PyTorch CNNs faster: prune, convert, run, and see why each layer runs as it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for module in (demo, forecast, prune, convert, run, plan, bench, cache, doctor):
    app.command(module.__name__.rpartition(".")[2])(module.main)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"escort {escort.__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
