"""The commands of escort as a user types them."""

from __future__ import annotations

from escort.cli import app
from tests.invoking import Invoking

_escort = Invoking(app)
invoke, succeed, succeed_json = _escort.invoke, _escort.succeed, _escort.succeed_json
