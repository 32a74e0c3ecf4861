"""Lanes: a few streams have one each, the others share one and wait for each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from escort.runtime import lanes
from escort.runtime.lanes import MOST_LANES, Gpu, Lane, lane_of


@pytest.fixture(autouse=True)
def no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_lanes", {})


def test_a_few_streams_have_lanes_of_their_own() -> None:
    found = [lane_of(0, stream) for stream in range(100, 100 + MOST_LANES + 3)]
    assert [lane.number for lane in found] == [*range(MOST_LANES), MOST_LANES, MOST_LANES, MOST_LANES]
    assert len({id(lane) for lane in found}) == MOST_LANES + 1
    assert lane_of(0, 101) is found[1] and lane_of(1, 101).number == 0


class Stream:
    """A stream, and the event of the lane."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.name = ""

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits")

    def record(self, stream: Any) -> None:
        self.log.append(f"{self.name} records")


def test_streams_that_share_a_lane_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: stream)
    own, shared = Lane(0, 0), Lane(0, MOST_LANES)
    for lane in (own, shared):
        for name, address in (("a", 1), ("a", 1), ("b", 2), ("a", 1)):
            stream.name = name
            lane.enter(address)
            lane.leave(address)
        assert stream.log == (
            [] if lane is own else ["a records", "a records", "b waits", "b records", "a waits", "a records"]
        )


def test_the_memory_of_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 5},
        {"device": 0, "segment_pool_id": (0, 2), "total_size": 7},
        {"device": 0, "segment_pool_id": (0, 1), "total_size": 11},
        {"device": 1, "segment_pool_id": (0, 1), "total_size": 13},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert Gpu(torch.device("cuda", 0)).reserved() == {(0, 1): 16, (0, 2): 7}
