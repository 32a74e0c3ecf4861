"""Result files are read back, documents get their tables and plots from them, and ours hold the committed results."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import pytest

from benchmarks import exhibits, suite
from benchmarks.result_files import Result, read_results
from escort import report
from tests.benchmarks.made_up import (
    HEADER,
    cells,
    everything,
    layer_rows,
)

DOCUMENT = """# A report

Before.

<!-- table: totals -->
what was here
<!-- end -->

Between.

<!-- table: networks-fp32 -->
<!-- end -->
"""


def test_documents_get_their_tables_and_keep_their_prose() -> None:
    once = exhibits.render(DOCUMENT, everything())
    assert "what was here" not in once and "| caffenet | fp32 | 128 | 4 | 40.0 | 240 | - | 6.00x | - |" in once
    assert once.startswith("# A report\n\nBefore.\n\n<!-- table: totals -->\n\n|") and "\n\nBetween.\n\n" in once
    assert exhibits.render(once, everything()) == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Nothing to fill\n", "no place for a table"),
        ("<!-- table: totals -->\n", "the place of table totals does not end"),
        ("<!-- table: totals -->\n<!-- table: aims -->\n<!-- end -->\n", "line 2: table aims begins before"),
        ("a\n<!-- table: total -->\n<!-- end -->\n", "line 2: the results hold no table total; there are .*totals"),
        ("<!-- end -->\n<!-- table: totals -->\n<!-- end -->\n", "line 1: <!-- end --> ends nothing"),
    ],
)
def test_documents_without_proper_places(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exhibits.render(text, everything())


def test_files_are_read_back_as_written(tmp_path: Path) -> None:
    rows = layer_rows("caffenet", direct=10.0)
    suite.write_results(tmp_path / "layers-fp16.json", HEADER, rows)
    (tmp_path / "another.json").write_text("not ours")
    assert read_results(tmp_path) == {"layers-fp16": Result(HEADER, rows)}
    (line,) = cells(exhibits.tables(read_results(tmp_path))["conditions"])
    assert (line["File"], line["Device"], line["Command"]) == ("layers-fp16", "a GPU, driver 580", "`escort`")


@pytest.mark.parametrize("text", ["", "{", '{"header": {}}', '{"header": {}, "rows": [{"layer": "a"}]}'])
def test_damaged_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "layers-fp32.json").write_text(text)
    with pytest.raises(ValueError, match=r"layers-fp32\.json is not a result file"):
        read_results(tmp_path)


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results of a study"):
        read_results(tmp_path)


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/h200"
#: Documents with tables. Those of the README and of the zoo are of committed results, whatever folder is rendered.
REPORTS = [ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/zoo.md", ROOT / "docs/many.md"]
ILLUSTRATED = [path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if ".svg)" in path.read_text()]


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
def test_the_reports_name_tables_that_there_are(document: Path) -> None:
    text = document.read_text()
    assert exhibits.render(text, everything()).count("\n|") > text.count("<!-- table:")


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
def test_the_reports_hold_the_committed_results(document: Path) -> None:
    shown = read_results(RESULTS) if document.name == "results.md" else {}
    assert exhibits.render(document.read_text(), shown) == document.read_text()


def test_the_results_have_no_number_outside_of_tables() -> None:
    prose = re.sub(r"<!-- table: .*?<!-- end -->", "", (ROOT / "docs/results.md").read_text(), flags=re.DOTALL)
    assert not re.findall(r"\d[.\d]*(?:x\b(?!\d)| ?%| us\b| ms\b)", prose.replace("(1x1)", ""))


@pytest.mark.parametrize("document", ILLUSTRATED, ids=lambda path: path.name)
def test_the_plots_in_the_documents_are_of_the_committed_results(document: Path, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plots = exhibits.illustrations(document.read_text(), read_results(RESULTS))
    assert len(plots) == document.read_text().count(".svg)")
    for path, plot in plots.items():
        committed = (document.parent / path).read_text()
        assert escape(plot.description) in committed
        # Other releases may place things otherwise.
        if f"matplotlib=={matplotlib.__version__}\n" in (ROOT / "constraints.txt").read_text():
            report.write_svg(tmp_path / "drawn.svg", plot)
            assert (tmp_path / "drawn.svg").read_text() == committed
