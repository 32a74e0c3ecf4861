"""The commands of python -m benchmarks as a user types them."""

from __future__ import annotations

from benchmarks.__main__ import app
from tests.invoking import Invoking

_benchmarks = Invoking(app)
invoke, succeed, succeed_json = _benchmarks.invoke, _benchmarks.succeed, _benchmarks.succeed_json
