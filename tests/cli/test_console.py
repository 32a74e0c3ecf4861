"""What commands say besides their results: where the machine is busy, and what no command takes."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from escort.cli.console import note_if_busy, reporting
from escort.planner import cores
from escort.planner.cores import busy_share
from tests.cli.invoking import invoke, succeed
from tests.cli.named import TINY


@pytest.mark.parametrize(
    "command",
    [
        ("convert", TINY, "--input", "1,3,8,8", "--output", "{tmp}/m.escort"),
        ("plan", TINY, "--input", "1,3,8,8"),
        ("bench", TINY, "--input", "1,3,8,8", "--against", "litert", "--rounds", "1"),  # which has no file
        ("demo", "--quick", "--out", "{tmp}/demo"),
    ],
)
def test_what_times_says_where_the_machine_is_busy(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "busy_share", lambda: 0.8)
    result = succeed(*(word.format(tmp=tmp_path) for word in command))
    assert result.stderr.count("warning: other processes take 80% of the time of this machine's") == 1
    assert "" not in result.stderr.splitlines()


def test_an_idle_machine_and_a_gpu_need_no_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note_if_busy("cpu")
    monkeypatch.setattr(cores, "busy_share", lambda: 0.8)
    note_if_busy("cuda")
    assert capsys.readouterr().err == ""


def clocks(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Lets Linux tell these times, one after the other, to a process that may use the first and the third core."""
    answers = iter(texts)
    monkeypatch.setattr(Path, "read_text", lambda path: next(answers))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 2})


def test_the_share_is_that_of_the_cores_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (
        "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 10 0 0 90 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 5 5 5 0 0 0 9 9\n"
    )
    after = (
        "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 20 0 0 90 0 0 0 0 0 0\ncpu1 99 0 0 0 0 0 0 0 0 0\ncpu2 0 0 5 25 15 0 0 0 99 9\n"
    )
    clocks(monkeypatch, before, after)
    assert busy_share(0.0) == pytest.approx(10 / 40)  # of the first core 10 of 10, of the third 0 of 30


def test_what_this_process_takes_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    own_s = iter([1.0, 1.2, 1.0, 1.2])
    monkeypatch.setattr("time.process_time", lambda: next(own_s))
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    clocks(monkeypatch, "cpu0 10 0 0 90\ncpu2 0 0 0 0\n", "cpu0 60 0 0 90\ncpu2 0 0 0 50\n")
    assert cores.Watch().others_share() == pytest.approx((50 - 20) / 100)
    clocks(monkeypatch, "cpu0 10 0 0 90\ncpu2 0 0 0 0\n", "cpu0 19 0 0 90\ncpu2 0 0 0 0\n")
    assert cores.Watch().others_share() == 0.0  # too little time has passed to say


def test_nothing_is_known_where_linux_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks(monkeypatch, "", "")
    assert busy_share(0.0) == 0.0

    def missing(path: Path) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert busy_share(0.0) == 0.0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["prune", TINY, "--method", "magnitude"],
            "'magnitude' is not one of 'uniform', 'global'; see .* prune --help",
        ),
        (["prune"], "Missing argument 'MODEL'; see .* prune --help"),
        (["bench", TINY, "--inputs", "1"], "No such option: --inputs .*--input.*; see .* bench --help"),
        (["optimise"], "No such command 'optimise'; see .* --help"),
        (["--wrong"], "No such option: --wrong.*; see .* --help"),
    ],
)
def test_what_no_command_takes(args: list[str], says: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert re.match(f"error: .*{says}\n$", result.stderr), result.stderr


def test_without_words_there_is_help() -> None:
    result = invoke()
    assert "Usage" in result.stdout + result.stderr and "error" not in result.stderr


@pytest.mark.parametrize(
    "command", [("plan",), ("convert", "--output", "{tmp}/m.escort"), ("bench", "--against", "litert", "--rounds", "1")]
)
def test_verbose_commands_say_what_is_done(command: tuple[str, ...], tmp_path: Path) -> None:
    words = [word.format(tmp=tmp_path) for word in command]
    arguments = (words[0], TINY, "--input", "1,3,8,8", *words[1:], "--json")
    quiet, verbose = invoke(*arguments), invoke(*arguments, "-v")
    assert "traced" not in quiet.stderr and json.loads(verbose.stdout).keys() == json.loads(quiet.stdout).keys()
    assert re.search(r"^traced in \d+\.\d\d s$", verbose.stderr, re.MULTILINE)
    assert "layer 0: " not in verbose.stderr
    logger = logging.getLogger("escort")
    assert logger.level == logging.NOTSET and len(logger.handlers) == 1


def test_very_verbose_commands_tell_of_each_layer(tmp_path: Path) -> None:
    assert "layer 0: " in succeed("plan", TINY, "--input", "1,3,8,8", "-vv").stderr


def test_what_is_logged_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(as_json=False, verbose=1):
        logging.getLogger("escort.layers").warning("layer %s", "a\x1b[2J\nb [bold]")
        logging.getLogger("escort.layers").debug("not this")
    assert capsys.readouterr().err == "warning: layer a\\x1b[2J\\nb [bold]\n"
    with reporting(as_json=False):
        logging.getLogger("escort.layers").warning("shown by itself")
        logging.getLogger("escort.layers").info("not this")
    assert capsys.readouterr().err == "warning: shown by itself\n"


def test_a_stored_plan_may_be_shown_verbosely(saved: Path) -> None:
    assert succeed("plan", saved, "-v").exit_code == 0
