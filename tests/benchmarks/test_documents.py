"""Result files are read back, documents get their tables and plots from them, and ours hold the committed results."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from benchmarks import exhibits, suite
from benchmarks.exhibits.catalogue import file_of
from benchmarks.exhibits.conditions import sources
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
    assert (line["File"], line["Device"], line["Last command"]) == ("layers-fp16", "a GPU, driver 580", "`escort`")
    assert (line["Versions"], line["Date"], line["Commits"]) == ("torch 2.13.0", "2026-11-21", "abc")


def test_the_conditions_name_the_commits_of_all_runs() -> None:
    runs = [{"date": "2026-11-20", "commit": commit, "command": "escort"} for commit in ("0123456789", None, "abc")]
    result = Result({**HEADER, "runs": runs}, [])
    (line,) = cells(exhibits.tables({"layers-fp16": result})["conditions"])
    assert (line["Commits"], line["Last command"]) == ("0123456, unknown, abc", "`escort` and 2 before")


VALUE = "It gains <!-- value: totals; vs cublas; Network=caffenet;\n Precision=fp32 -->{}<!-- /value -->, mostly.\n"


def test_sentences_get_their_values() -> None:
    assert exhibits.render(VALUE.format("9x"), everything()) == VALUE.format("6.00x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("totals", "sums"), "there is no table sums"),
        (("vs cublas", "vs nobody"), "table totals has no column vs nobody"),
        (("Network=", "Net="), "table totals has no column Net"),
        (("fp32", "fp64"), "0 rows of table totals are so"),
        ((";\n Precision=fp32", ""), r"\d rows of table totals are so, of which there must be one"),
    ],
)
def test_values_that_are_nowhere(change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exhibits.render(VALUE.format("9x").replace(*change), everything())


def test_tables_name_their_files() -> None:
    rendered = exhibits.render(DOCUMENT, everything())
    assert "\nFrom `layers-fp32`, `layers-tf32`, `layers-fp16` (abc).\n" in rendered
    assert "\nFrom `networks-fp32` (abc).\n" in rendered


def test_what_is_older_than_the_last_commit_of_its_folder_says_so() -> None:
    results = everything()
    for stem, date, commit in (("layers-tf32", "2026-11-22", "0123456789"), ("networks-fp16", "2026-11-30", None)):
        results[stem] = replace(results[stem], header={**HEADER, "date": date, "commit": commit})
    told = "`layers-fp32`, `layers-fp16` (abc of 2026-11-21); `layers-tf32` (0123456 of 2026-11-22)."
    assert "The last commit" not in exhibits.render(DOCUMENT, everything())
    assert told in (rendered := exhibits.render(DOCUMENT, results)) and "The last commit here is unknown." in rendered
    of_folders = {
        "h200/a": results["networks-fp16"],
        "h200/b/c": results["layers-tf32"],
        "cpu/a": results["layers-fp32"],
    }
    told = "From `cpu/a` (abc); `h200/a` (unknown); `h200/b/c` (0123456 of 2026-11-22)."
    assert sources(["cpu/a", "h200/a", "h200/b/c"], of_folders) == f"{told} The last commit of `h200` is unknown."


def test_a_table_of_a_precision_that_was_not_measured_says_so() -> None:
    place = "<!-- table: speed-tf32 -->\n<!-- end -->\n"
    assert "`speed-tf32` has no rows of this from this device." in exhibits.render(place, everything())
    assert [file_of(f"{name}-tf32") for name in ("callers", "calls", "sparse-layers", "totals")] == [
        *("conversions-tf32", "networks-tf32", "layers-tf32", None)
    ]
    with pytest.raises(ValueError, match="no table speed-tf64"):
        exhibits.render(place.replace("tf32", "tf64"), everything())


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
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Documents with tables or values. What results.md alone has is of one folder, all else of committed files, whatever
#: folder is rendered. The table of onnx.md is of tests/integrations, which write it.
REPORTS = [
    path for path in DOCUMENTS if path.name != "onnx.md" and re.search(r"(?<!`)<!-- (table|value):", path.read_text())
]
ILLUSTRATED = [path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if ".svg)" in path.read_text()]


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
def test_the_reports_name_tables_that_there_are(document: Path) -> None:
    text = document.read_text()
    results = everything() | read_results(RESULTS)  # made-up rows stand in for files that are not there yet
    assert exhibits.render(text, results).count("\n|") >= text.count("<!-- table:")


@pytest.mark.parametrize("document", REPORTS, ids=lambda path: path.name)
def test_the_reports_hold_the_committed_results(document: Path) -> None:
    shown = read_results(RESULTS) if document.name == "results.md" else {}
    assert exhibits.render(document.read_text(), shown) == document.read_text()


#: What a result looks like in a sentence.
MEASURED = re.compile(
    r"\d[\d.,]*\s?(?:x\b(?!\d)|times\b|µs\b|us\b|ms\b|s\b|(?:second|minute|hour)s?\b|%|[kMG]B\b|[GT](?:FLOP|B)/s)"
    r"|\b(?:half|twice|thrice|(?:two|three|four|five|six|seven|eight|nine|ten) times) as (?:fast|slow|long)"
)
#: What looks so and is none: settings, constants of the code, and arithmetic.
NO_RESULTS = re.compile(
    r"\d+ %\s(?:zeros|sparsity|of their weights zero)|pruned to \d+ %|more than 5 % of these cores|at most 5 ms"
    r"|to 50 %, 80 %\sand 95 % zeros|less than 1\.2 times as fast|\(1x1\)"
    r"|a filter takes 12\.5 % of its\sdense size, at 98 %, where gaps need two bytes, 3 %"
)


def prose(text: str) -> str:
    """A document without its tables, its values and what is code."""
    for left_out in (
        r"<!-- (table): .*?<!-- end -->",
        r"<!-- (value): .*?<!-- /value -->",
        r"(?m:^ *)```.*?```",
        r"(?m:^    .*$)",
        r"`[^`]*`",
    ):
        text = re.sub(left_out, "", text, flags=re.DOTALL if "(?m:^    " not in left_out else 0)
    return NO_RESULTS.sub("", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_sentences_hold_no_number_that_is_in_no_file(document: Path) -> None:
    found = [match[0] for match in MEASURED.finditer(prose(document.read_text()))]
    assert not found, (
        f"{found}: let them be values of tables, <!-- value: TABLE; COLUMN; OTHER=TEXT -->, or leave them out"
    )


@pytest.mark.parametrize("text", ["1.43x as fast", "in 12 ms", "gains 8 %", "twice as fast", "took 3 s", "249 MB"])
def test_a_number_in_a_sentence_is_found(text: str) -> None:
    value = "<!-- value: a; b -->1.0x<!-- /value -->"
    assert MEASURED.search(prose(f"It is {value} and {text}.")) and not MEASURED.search(
        prose(f"It is {value}, `{text}`.")
    )


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
