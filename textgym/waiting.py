"""Waiting for asynchronous functions of users from ordinary code."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_process: int | None = None


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Run an awaitable to completion and return its result.

    All run on one event loop in a thread of its own: so it works where the caller's thread already runs a
    loop, as in a notebook, and connections that a function keeps open between calls stay usable.
    """

    async def result() -> Any:
        return await awaitable

    # An async reward that calls another one is on that thread, and its loop is busy with it.
    if threading.current_thread() is _thread:
        return _run_in_new_thread(result())
    future = asyncio.run_coroutine_threadsafe(result(), _running_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()  # after Ctrl-C nothing must go on in the background
        raise


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _thread, _process
    with _lock:
        if _loop is None or _process != os.getpid():  # threads do not survive a fork
            _loop, _process = asyncio.new_event_loop(), os.getpid()
            _thread = threading.Thread(target=_loop.run_forever, name="textgym-async", daemon=True)
            _thread.start()
        return _loop


def _run_in_new_thread(coroutine: Any) -> Any:
    outcome: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:  # raised again in the waiting thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
