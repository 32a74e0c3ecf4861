"""Commands as a user types them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from typer import Typer
from typer.testing import CliRunner, Result


@dataclass(frozen=True)
class Invoking:
    """Invokes the commands of an app."""

    app: Typer

    def invoke(self, *args: object) -> Result:
        return CliRunner().invoke(self.app, [str(arg) for arg in args])

    def succeed(self, *args: object) -> Result:
        result = self.invoke(*args)
        assert result.exit_code == 0, result.output
        return result

    def succeed_json(self, *args: object) -> dict[str, Any]:
        return json.loads(self.succeed(*args, "--json").stdout)
