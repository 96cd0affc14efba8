"""What a scrape answers while the folder is in trouble."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from modelserve.monitor.metrics import exporter as module
from modelserve.monitor.metrics.exporter import Exporter
from modelserve.monitor.metrics.exposition import Figures
from modelserve.monitor.metrics.shared_folder import MetricsFolder


class Process:
    """An exporter of one count."""

    def __init__(self, folder: Path | None) -> None:
        self.hits = 0
        self.exporter = Exporter(self._figures, folder, lambda _: None)

    def _figures(self) -> Figures:
        return Figures({"": {"modelserve_batches_total": float(self.hits)}}, {})

    async def scrape(self) -> int:
        return int((await self.exporter.text()).split()[-1])


@pytest.fixture
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Process, Process]]:
    """Two processes with one folder, which are quick to lose patience."""
    monkeypatch.setattr(module, "_LIMIT_S", 0.3)
    one, other = Process(tmp_path / "metrics"), Process(tmp_path / "metrics")
    for each in (one, other):
        await each.exporter.start()
    yield one, other
    for each in (one, other):
        await each.exporter.stop()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A folder that answers nobody from when this is set, until the test is over."""
    begun, over = threading.Event(), threading.Event()
    for name in ("exchange", "write", "close"):
        call = getattr(MetricsFolder, name)

        def waits(self: MetricsFolder, figures: Figures, call: object = call) -> object:
            if begun.is_set():
                over.wait(30)
            return call(self, figures)  # type: ignore[operator]

        monkeypatch.setattr(MetricsFolder, name, waits)
    yield begun
    over.set()


async def test_a_folder_that_does_not_answer_costs_a_scrape_no_more_than_the_limit(
    stuck: threading.Event, two: tuple[Process, Process], caplog: pytest.LogCaptureFixture
) -> None:
    """The others are shown as they were last read: the sum stands, and does not go back. So it ends in time, too."""
    one, other = two
    one.hits, other.hits = 1, 10
    await other.scrape()
    assert await one.scrape() == 11
    stuck.set()
    one.hits = 2
    began = time.monotonic()
    assert set(await asyncio.gather(one.scrape(), one.scrape())) == {12}
    assert time.monotonic() - began < 3
    await one.exporter.stop()
    assert time.monotonic() - began < 6
    assert caplog.messages == [f"metrics: {one.exporter._folder} cannot be used: it does not answer"]


async def test_a_process_that_has_read_nothing_yet_answers_for_itself(
    stuck: threading.Event, two: tuple[Process, Process]
) -> None:
    """There is always an answer."""
    one, other = two
    stuck.set()
    one.hits, other.hits = 1, 10
    assert await one.scrape() == 1


async def test_threads_end_with_the_exporter(tmp_path: Path) -> None:
    """Nothing is left when it was stopped, whether it had a folder or not."""
    for folder in (tmp_path, None):
        process = Process(folder)
        await process.exporter.start()
        assert await process.scrape() == 0
        await process.exporter.stop()
    give_up = time.monotonic() + 5
    while any(thread.name.startswith("modelserve-metrics") for thread in threading.enumerate()):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.01)
