"""Asking a database that may not answer."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from modelserve.errors import BackendUnavailable
from modelserve.resilience import executor as asking
from modelserve.resilience.executor import DaemonExecutor, call_with_timeout


async def test_a_question_without_an_answer_is_given_up_and_the_next_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that waits for ever is left behind; what is asked later is answered by another."""
    monkeypatch.setattr(asking, "ANSWER_LIMIT_S", 0.05)
    askers, answer = DaemonExecutor(1, "modelserve-test", limit_s=0.01), threading.Event()
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="not answered within"):
            await call_with_timeout(askers, answer.wait)
    assert await call_with_timeout(askers, lambda: 3) == 3
    answer.set()
    askers.shutdown()
    for each in threading.enumerate():
        if each.name.startswith("modelserve-test"):
            await asyncio.to_thread(each.join, 10)
            assert not each.is_alive()


async def test_waiting_for_those_before_it_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty questions of a fifth of the limit each, to one thread: the last waits for four times the limit."""
    monkeypatch.setattr(asking, "ANSWER_LIMIT_S", 0.5)
    askers = DaemonExecutor(1, "modelserve-test", limit_s=60)
    assert await asyncio.gather(*(call_with_timeout(askers, time.sleep, 0.1) for _ in range(20))) == [None] * 20
    askers.shutdown()


async def test_a_question_behind_one_that_is_never_answered_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing moves the wait has an end, though the question never began."""
    monkeypatch.setattr(asking, "ANSWER_LIMIT_S", 0.1)
    askers, answer, asked = DaemonExecutor(1, "modelserve-test", limit_s=60), threading.Event(), threading.Event()
    askers.submit(answer.wait)
    with pytest.raises(BackendUnavailable, match="not answered within"):
        await call_with_timeout(askers, asked.set)
    await asyncio.sleep(0)  # in which it is withdrawn
    answer.set()
    assert await call_with_timeout(askers, int) == 0
    assert not asked.is_set()
    askers.shutdown()


async def test_what_a_call_raises_is_raised() -> None:
    """Errors reach whoever asked."""
    askers = DaemonExecutor(1, "modelserve-test")
    with pytest.raises(ZeroDivisionError):
        await call_with_timeout(askers, lambda: 1 // 0)
    assert await call_with_timeout(askers, divmod, 7, 2) == (3, 1)
    askers.shutdown()
    with pytest.raises(RuntimeError, match="shutdown"):
        askers.submit(int)


async def test_no_more_threads_ask_than_there_are_to_be() -> None:
    """Quick questions share the threads; each is answered, in the order they were asked of one thread."""
    askers = DaemonExecutor(2, "modelserve-test")
    names = await asyncio.gather(
        *(call_with_timeout(askers, lambda: threading.current_thread().name) for _ in range(50))
    )
    assert len(set(names)) <= 2
    askers.shutdown()


def test_the_interpreter_exits_while_a_question_is_open() -> None:
    """A program whose database stands still ends when it is done, not when the database answers."""
    imports = "import time; from modelserve.resilience.executor import DaemonExecutor"
    code = f"{imports}; DaemonExecutor(1, 'm').submit(time.sleep, 1000)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
