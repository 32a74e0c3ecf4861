"""How `make docs` makes pages of the Markdown there is. Their source is the root of the repository."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

project = "Escort"
author = "the authors of Escort"
version = release = installed("escort-sparse")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["README.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md", "docs/notes/*.md"]
root_doc = "README"
myst_heading_anchors = 3
napoleon_google_docstring = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"Escort {version}"
html_show_copyright = False

#: The pages beside the first one, in the order of a reader.
_CONTENTS = {
    "Use": ["docs/guide", "docs/api", "docs/pruners", "docs/onnx", "docs/many", "docs/zoo", "SECURITY", "CHANGELOG"],
    "How fast, how it works": [
        "docs/which-method",
        "docs/results",
        "docs/devices",
        "docs/architecture",
        "docs/format",
        "docs/notes/README",
    ],
}


def setup(app: Sphinx) -> None:
    """README is the first page; what Sphinx wants to know of the others does not stand in it."""
    app.connect("source-read", _add_contents)


def _add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    if name == root_doc:
        for caption, pages in _CONTENTS.items():
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
    elif name == "docs/notes/README":
        notes = sorted(path.stem for path in Path(__file__).parent.glob("notes/*.md") if path.stem != "README")
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(notes) + "\n```\n"
