"""Pages hold what they were given, as text; charts need no other file."""

import io
import re
import sys
from html.parser import HTMLParser

import pytest
from markupsafe import escape

from escort import report

HOSTILE = "<script>alert('&\"')</script> [bold]$body$"


def every_section() -> list[report.Section]:
    return [
        report.Text(HOSTILE, (HOSTILE,)),
        report.Facts(HOSTILE, {HOSTILE: HOSTILE}),
        report.Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, "1,234"),), HOSTILE),
        report.bar_chart(HOSTILE, [HOSTILE], {HOSTILE: [1.0], "b": [2.0]}, HOSTILE),
        report.line_chart(HOSTILE, [1, 2], {HOSTILE: [1.0, 3.0]}, HOSTILE, HOSTILE),
        report.horizontal_bars(HOSTILE, [HOSTILE], {HOSTILE: [1.0], "b": [None]}, HOSTILE, mark=1.0),
        report.horizontal_bars(HOSTILE, [HOSTILE], {HOSTILE: [1.0], "b": [3.0]}, HOSTILE, stacked=True),
    ]


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    report.write_html(path, HOSTILE, every_section())
    return path.read_text(encoding="utf-8")


def test_everything_is_escaped(html):
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) >= 12  # title, headings, and each text of each section
    assert escape(HOSTILE) in html


def test_a_page_holds_no_characters_that_hide_or_reorder(tmp_path):
    hidden, seen = "conv\x1b]0;x\x07\u202e1\n", r"conv\x1b]0;x\x07\u202e1\n"
    sections = [
        report.Text(hidden, (hidden,)),
        report.Table(hidden, (hidden,), ((hidden,),), hidden),
        report.bar_chart(hidden, [hidden], {"a": [1.0]}, "us"),
        report.horizontal_bars(hidden, [hidden], {"a": [1.0]}, "us"),
    ]
    report.write_html(tmp_path / "page.html", hidden, sections)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count(seen) >= 14 and all(c.isprintable() or c == "\n" for c in page)


def test_the_page_asks_the_network_for_nothing(html):
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "img", "iframe", "script")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in html
    assert "url(http" not in html


def test_the_page_is_accessible(html):
    page = Page(html)
    attributes = [a for _, a in page.tags]
    assert page.tags[0] == ("html", {"lang": "en"})
    svgs = [a for tag, a in page.tags if tag == "svg"]
    assert len(svgs) == 4
    assert all(a["role"] == "img" and a["aria-label"] for a in svgs)
    headers = [a for tag, a in page.tags if tag == "th"]
    assert {a["scope"] for a in headers} == {"col", "row"}
    ids = [a["id"] for a in attributes if "id" in a]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html
    assert not re.search("#0[14]0[25]0[36]", html)  # the stand-in colours are all replaced


def test_numbers_are_flush_right_and_words_are_not(tmp_path):
    table = report.Table("t", ("name", "time", "gain"), (("a", "1,234", "2.00x"), ("b", "-", "-")))
    report.write_html(tmp_path / "page.html", "t", [table])
    flush_right = [
        a.get("class") == "number" for tag, a in Page((tmp_path / "page.html").read_text()).tags if tag == "th"
    ]
    assert flush_right[:3] == [False, True, True]


def test_a_heading_and_a_caption_may_be_wider_than_their_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    heading, caption = "Forecast of the whole network", "A forecast of speed: it says nothing of accuracy."
    lines = report.text(report.Table(heading, ("a",), (("1",),), caption)).splitlines()
    assert (lines[0], lines[-1]) == (heading, caption)


def test_a_markdown_table():
    table = report.Table("t", ("name", "time"), (("a|b", "1,234"), ("two\nlines", "-")), "In microseconds.")
    assert report.markdown(table) == (
        "| name | time |\n| --- | ---: |\n| a\\|b | 1,234 |\n| two lines | - |\n\nIn microseconds."
    )


def test_bars_say_what_they_show():
    chart = report.horizontal_bars(
        "t", ["conv1", "conv2"], {"over a": [1.5, None], "over b": [2.0, 12.0]}, "Times faster"
    )
    assert chart.description == "Times faster. conv1: over a 1.5, over b 2; conv2: over a -, over b 12."
    assert chart.svg.count(">12<") >= 1 and "conv2" in chart.svg


def test_a_plot_in_a_file_of_its_own(tmp_path):
    report.write_svg(tmp_path / "a.svg", report.bar_chart("t", ["a"], {HOSTILE: [1.0]}, HOSTILE))
    svg = (tmp_path / "a.svg").read_text()
    (root, attributes), *_ = Page(svg).tags
    assert root == "svg" and HOSTILE in str(attributes["aria-label"])
    assert "var(" not in svg and "currentColor" not in svg  # they mean nothing outside of a page


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="table 'times' has 2 columns"):
        report.Table("times", ("a", "b"), (("1",),))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install escort-sparse\[demo\]"):
        report.bar_chart("t", ["a"], {"b": [1.0]}, "µs")


def test_an_unwritable_path_raises(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        report.write_html(tmp_path / "file" / "page.html", "t", [])
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_progress_bar_is_for_those_who_watch():
    assert report.Console(force_terminal=True).is_watched and report.Console(force_jupyter=True).is_watched
    assert not report.Console(file=io.StringIO()).is_watched
