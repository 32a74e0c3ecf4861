"""Commands as a user types them."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from escort.cli import app


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result


def succeed_json(*args: object) -> dict[str, Any]:
    return json.loads(succeed(*args, "--json").stdout)
