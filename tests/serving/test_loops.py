"""Work in another thread's loop, and a loop of one's own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from modelserve.errors import NotRunning
from modelserve.serving import loops
from modelserve.serving.loops import PrivateLoop, elsewhere


@pytest.fixture
def private() -> Iterator[PrivateLoop]:
    """An open private loop whose last work is nothing."""
    private = PrivateLoop(nothing)
    private.open()
    yield private
    private.close()


async def nothing() -> None:
    """End at once."""


async def test_work_elsewhere_runs_in_the_thread_of_its_loop(private: PrivateLoop) -> None:
    """Its result comes back, and so does its error."""

    async def where() -> str:
        return threading.current_thread().name

    async def failing() -> None:
        raise KeyError("x")

    assert await elsewhere(private.open(), where()) == "modelserve"
    with pytest.raises(KeyError):
        await elsewhere(private.open(), failing())


async def test_cancelling_the_caller_cancels_the_work(private: PrivateLoop) -> None:
    """What waits in the other loop is given up with the caller that waits for it here."""
    began, gave_up = threading.Event(), threading.Event()

    async def waits() -> None:
        began.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            gave_up.set()
            raise

    waiting = asyncio.create_task(elsewhere(private.open(), waits()))
    await asyncio.to_thread(began.wait, 20)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(gave_up.wait, 20)


@pytest.mark.parametrize("cancels", [True, False], ids=["cancels what is left", "stops only"])
async def test_a_loop_that_ends_leaves_its_callers_an_error(monkeypatch: pytest.MonkeyPatch, *, cancels: bool) -> None:
    """The caller learns that there is no answer, whether or not that loop cancels what it leaves behind."""
    monkeypatch.setattr(loops, "_LOOK_S", 0.01)
    loop, began = asyncio.new_event_loop(), threading.Event()

    async def waits() -> None:
        began.set()
        await loop.create_future()

    async def cancel_what_is_left() -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def run() -> None:
        loop.run_forever()
        if cancels:
            loop.run_until_complete(cancel_what_is_left())

    thread = threading.Thread(target=run)
    thread.start()
    waiting = asyncio.create_task(elsewhere(loop, waits()))
    await asyncio.to_thread(began.wait, 20)
    loop.call_soon_threadsafe(loop.stop)
    with pytest.raises(NotRunning, match="closed"):
        await waiting
    await asyncio.to_thread(thread.join)
    await asyncio.to_thread(loop.run_until_complete, cancel_what_is_left())
    loop.close()


async def test_a_closed_loop_takes_no_work() -> None:
    """What comes too late is refused, not left waiting."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(NotRunning, match="closed"):
        await elsewhere(loop, nothing())


def test_a_private_loop_says_whether_it_was_ever_open() -> None:
    """Before it is opened and after it is closed there is no loop, which the error tells apart."""
    done: list[str] = []

    async def last() -> None:
        done.append("last")

    private = PrivateLoop(last)
    with pytest.raises(NotRunning, match="not started"):
        private.call(nothing())
    assert private.open() is private.open()
    assert private.open().is_running()
    private.close()
    assert done == ["last"]
    with pytest.raises(NotRunning, match="closed"):
        private.call(nothing())
