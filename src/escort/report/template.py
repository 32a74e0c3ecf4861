"""HTML from the templates of this folder. Whatever is put into them is escaped, and every character of it is seen."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from escort.report.console import printable


def render(template: str, **values: Any) -> str:
    """What a template makes of values."""
    return _environment().get_template(template).render(values)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(
        loader=folder,
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # markup is another type
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
