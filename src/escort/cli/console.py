"""How commands speak: text for people, JSON for programs, and errors as one message with an exit code."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from escort.planner import cores
from escort.report import Console, Description, printable

#: Exit codes.
FAILED, BAD_INPUT = 1, 2

_NAMED_BY_THE_USER = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
_PIPE_WIDTH = 160  # columns of a table that no terminal shows


class Output:
    """What a command has to say.

    Attributes:
        text: for people: stdout, or stderr where stdout is for JSON.
        result: what --json prints once the command is through.
        failed: set for a negative finding: the result is printed, and the exit code is 1.
    """

    def __init__(self) -> None:
        self.text = Console()
        if not self.text.is_terminal:
            self.text = Console(width=_PIPE_WIDTH)
        self.result: Mapping[str, Any] = {}
        self.failed = False


@contextmanager
def reporting(as_json: bool, verbose: int = 0) -> Iterator[Output]:
    """Runs the body of a command: an error becomes one message and an exit code, JSON goes to stdout at the end.

    Args:
        verbose: 0 shows on stderr what is logged at WARNING, 1 at INFO too, 2 at DEBUG too.
    """
    stdout = sys.stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # shows characters that the terminal's encoding lacks
    try:
        # A model's own code may print: under --json that goes to stderr too.
        to_stderr = redirect_stdout(sys.stderr) if as_json else nullcontext()
        with _notes_for_warnings(), _notes_for_log(verbose), to_stderr:
            output = Output()
            yield output
    except (ValueError, TypeError) as error:
        fail(str(error), BAD_INPUT)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        fail(message, BAD_INPUT if isinstance(error, _NAMED_BY_THE_USER) else FAILED)
    except typer.Exit:
        raise
    except (ImportError, MemoryError, RuntimeError) as error:
        fail(str(error) or type(error).__name__, FAILED)
    except Exception as error:
        for line in "".join(traceback.format_tb(error.__traceback__)).splitlines():
            note(line)
        fail(f"{type(error).__name__}: {error}; please report this with the lines above", FAILED)
    if as_json:
        # JSON has no word for the infinite error of a candidate whose output held NaN.
        finite = json.loads(json.dumps(output.result), parse_constant=lambda _: None)
        print(json.dumps(finite, indent=2), file=stdout)
    if output.failed:
        raise typer.Exit(FAILED)


@contextmanager
def _notes_for_warnings() -> Iterator[None]:
    """Shows warnings, which may name layers and files, as notes."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *args, **options: note(f"warning: {message}")
        yield


class _Notes(logging.Handler):
    """Shows what is logged, which may name layers and files, as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        note(level + record.getMessage())


@contextmanager
def _notes_for_log(verbose: int) -> Iterator[None]:
    """Shows what Escort logs as notes: warnings, and what else shall be shown."""
    log, handler = logging.getLogger("escort"), _Notes()
    before = log.level
    log.addHandler(handler)
    log.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


def check_is_file(path: Path, wanted: str) -> None:
    """Raises FileNotFoundError where there is no file, which says to name what is wanted."""
    if not path.is_file():
        problem = "it is a folder" if path.is_dir() else "there is no such file"
        raise FileNotFoundError(f"{path}: {problem}; name {wanted}")


def fail(message: str, code: int) -> NoReturn:
    """Prints an error in one line, and leaves with an exit code."""
    line = Text.assemble(("error:", "bold red"), " ", printable(message))
    Console(stderr=True).print(line, soft_wrap=True)
    raise typer.Exit(code)


def first_sentence(error: Exception) -> str:
    """An error's type and what it says first; behind that, libraries say how to read a file without their checks."""
    said = str(error).strip().partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def note(message: str) -> None:
    """Prints a line about what is going on, on stderr: above a progress bar, where there is one."""
    print(printable(message), file=sys.stderr)


def note_if_busy(device: str) -> None:
    """Says so where other processes keep the cores busy on which something is about to be timed."""
    share = cores.busy_share() if device == "cpu" else 0.0
    if share > cores.BUSY:
        note(
            f"warning: other processes take {share:.0%} of the time of this machine's {cores.count()} cores: times "
            "will be too long, and choices may be wrong; wait for them, or stop them, and start again"
        )


def progress(console: Console | None = None) -> Progress:
    """Progress bars: on stderr where it is a terminal, until the end, or on a console, where they stay."""
    columns = Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    if console is not None:
        return Progress(*columns, console=console)
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_watched)


def command_line(program: str = "escort") -> str:
    """The command of this process, for results. Files are named without their folders, which are nobody's business."""
    words = [",".join(Path(name).name for name in word.split(",")) if "/" in word else word for word in sys.argv[1:]]
    return f"{program} {shlex.join(words)}"
