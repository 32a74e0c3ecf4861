"""Result files with old names of config fields get today's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.migrate import main, migrate
from benchmarks.result_files import Result
from tests.benchmarks.made_up import HEADER, row

DIRECT = {"words": 7, "rows": 4, "row_warps": 2, "channel_warps": 1, "blocks": 3, "balanced": True, "part": "direct"}
TODAY = {
    "words": 7,
    "out_channels": 4,
    "out_channel_warps": 2,
    "in_channel_warps": 1,
    "occupancy": 3,
    "balanced": True,
    "part": "direct",
}


@pytest.mark.parametrize(
    ("method", "config", "today"),
    [
        ("direct", DIRECT, TODAY),
        (
            "generated",
            {"rows": 32, "blocks": 1, "entries": 2, "together": 4, "scouts": 1, "timer": "events"},
            {
                "out_channels": 32,
                "occupancy": 1,
                "start_points": 2,
                "multicast": 4,
                "prefetch_warps": 1,
                "timer": "events",
            },
        ),
        (
            "sparse_tc",
            {"fill": "halo", "blocks": 2, "rows": 3, "images": 4, "layout": "channels_last"},
            {"tap_group": "halo", "m_blocks": 2, "rows": 3, "samples": 4, "memory_format": "channels_last"},
        ),
        ("cublas", {"unfold": "by_image", "product": "by_group"}, {"unfold": "by_sample", "product": "by_group"}),
        ("cusparse", {"unfold": "by_image"}, {"unfold": "by_sample"}),
        ("escort", {"kept_dense": False, "images": 8}, {"kept_dense": False, "samples": 8}),
        (
            "cudnn",
            {"memory_format": "contiguous", "output": "as_is"},
            {"memory_format": "contiguous", "output": "as_is"},
        ),
    ],
)
def test_configs_have_the_names_of_today(
    tmp_path: Path, method: str, config: dict[str, Any], today: dict[str, Any]
) -> None:
    before = row("caffenet", "conv2", method, 5.0, config=config)
    suite.write_results(tmp_path / "layers-fp32.json", HEADER, [before])
    assert bool(migrate(tmp_path)) == (config != today)
    after = Result.read(tmp_path / "layers-fp32.json")
    assert list(after.rows[0].config.items()) == list(today.items()), "in their order"
    assert (after.rows[0].method, after.rows[0].time_us) == (method, 5.0)
    assert ("migrated" in after.header) == (config != today)
    assert {**HEADER, **after.header} == after.header


def test_a_migrated_file_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h200" / "layers-fp32.json"
    path.parent.mkdir()
    (tmp_path / "aims.json").write_text('{"direct": []}')
    suite.write_results(path, HEADER, [row("caffenet", "conv2", "direct", 5.0, config=DIRECT)])
    main([str(tmp_path)])
    once = path.read_text()
    assert "rows -> out_channels" in json.loads(once)["header"]["migrated"] and str(path) in capsys.readouterr().out
    main([str(tmp_path)])
    assert path.read_text() == once and not capsys.readouterr().out
    assert (tmp_path / "aims.json").read_text() == '{"direct": []}'
