"""The decorator that makes a function a command: options from dataclasses, --json, and errors as one message."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

from escort.cli.console import Output
from escort.cli.options import ModelOptions, command


@dataclass(frozen=True)
class SizeOptions:
    width: Annotated[int, typer.Argument()]
    height: Annotated[int, typer.Option("--high", help="Rows.")] = 2

    def __post_init__(self) -> None:
        if self.height > 9:
            raise ValueError("too high")


@command
def area(size: SizeOptions, output: Output, scale: Annotated[float, typer.Option()] = 1.0) -> None:
    """Says how large it is."""
    output.result = {"area": scale * size.width * size.height}
    output.text.print("an area")
    output.failed = scale == 0.0


def run(*args: str) -> Result:
    app = typer.Typer()
    app.command()(area)
    return CliRunner().invoke(app, args)


def test_a_dataclass_stands_for_its_options() -> None:
    assert json.loads(run("3", "--json").stdout) == {"area": 6.0}
    assert json.loads(run("3", "--high", "5", "--scale", "0.5", "--json").stdout) == {"area": 7.5}


def test_text_and_json_do_not_mix() -> None:
    assert run("3").stdout == "an area\n"
    result = run("3", "--json")
    assert result.stderr == "an area\n" and result.stdout.startswith("{")


def test_the_help_holds_all_options_and_the_docstring() -> None:
    text = run("--help").stdout.replace("WIDTH", "width")
    assert all(word in text for word in ("width", "--high", "Rows.", "--scale", "--json", "Says how large it is."))


def test_what_a_dataclass_refuses_is_bad_input() -> None:
    result = run("3", "--high", "10")
    assert result.exit_code == 2 and result.stderr == "error: too high\n"


def test_a_negative_finding_prints_its_result_and_fails() -> None:
    result = run("3", "--scale", "0", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout) == {"area": 0.0}


@pytest.mark.parametrize(
    "options", [{"device": "cuda"}, {"shapes": ["1,3,8,8"]}, {"effort": "best"}, {"favor": "latency"}]
)
def test_options_differ_from_defaults(options: dict[str, object]) -> None:
    assert ModelOptions("net").are_default and ModelOptions("net", shapes=[]).are_default
    assert not ModelOptions("net", **options).are_default  # type: ignore[arg-type]
