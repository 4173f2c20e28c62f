"""An event loop whose clock jumps to the next event, and processes that can stop or die.

A run has one thread, and its seed decides the order of everything. Ready callbacks run in the
order of their arrival, as in asyncio's own loop. Timers run in the order of their time. The tasks
of a dead process (:class:`Host`) run no further; those of a stopped one run later.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from itertools import count
from typing import Any, TypeVarTuple

Ts = TypeVarTuple("Ts")


class Host:
    """A simulated process.

    Attributes:
        name: its name in the trace.
        is_dead: none of its tasks runs any more.
        stopped_until: time in seconds before which none of its tasks runs.
        held: share of its messages, in both directions, that the network holds back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.stopped_until = 0.0
        self.held = 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self._context = Context()
        self._context.run(_HOST.set, self)

    def start(self, loop: Loop, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine, and all tasks that it starts, in this process."""
        return loop.create_task(work, context=self._context)


_HOST: ContextVar[Host | None] = ContextVar("host", default=None)


class Loop(asyncio.AbstractEventLoop):
    """Event loop of one run.

    Args:
        after_step: called after each callback.
    """

    def __init__(self, after_step: Callable[[], None]) -> None:
        self.steps = 0
        self.is_over = False
        self._after_step = after_step
        self._now = 0.0
        self._ready: deque[tuple[asyncio.Handle, Host | None]] = deque()
        self._timers: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._numbers = count()
        self._tasks: list[asyncio.Task[Any]] = []

    # asyncio's interface -----------------------------------------------------------------

    def time(self) -> float:
        """Return the virtual seconds since the run began."""
        return self._now

    def get_debug(self) -> bool:
        """Return False: a run never uses asyncio's debug mode."""
        return False

    def is_running(self) -> bool:
        """Return True: callers only ask during a run."""
        return True

    def is_closed(self) -> bool:
        """Return False: callers only ask during a run."""
        return False

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback as soon as possible."""
        context = context or copy_context()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, context.get(_HOST)))
        return handle

    call_soon_threadsafe = call_soon  # a run has one thread

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback after a delay in seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback at a time in virtual seconds."""
        context = context or copy_context()
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        host = context.get(_HOST)
        self._at(when, self._run_in_host, handle, host)
        return handle

    def _at(self, when: float, callback: Callable[..., object], *args: object) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), callback, args))

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: the loop drops cancelled timers when they are due."""

    def create_future(self) -> asyncio.Future[Any]:
        """Make a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """Make a task in the calling process, or in the process that ``context`` names."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        host = (context or copy_context()).get(_HOST)
        (self._tasks if host is None else host.tasks).append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """End the run for errors of callbacks, which are bugs of the simulator.

        The caller that awaits a task sees the task's own errors.
        """
        if "handle" in context:
            raise SystemExit(f"{context['message']}: {context['exception']!r}") from context[
                "exception"
            ]

    # running -----------------------------------------------------------------------------

    def soon(self, callback: Callable[..., object], *args: object) -> None:
        """Schedule a callback as soon as possible, outside all processes."""
        self.later(0.0, callback, *args)

    def later(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        """Schedule a callback after a delay in seconds, outside all processes."""
        self._at(self._now + delay, callback, *args)

    def run(self, until: float) -> None:
        """Run until ``is_over`` is set, no event is left, or the clock reaches ``until``."""
        ready, timers, after_step = self._ready, self._timers, self._after_step
        asyncio._set_running_loop(self)
        try:
            while not self.is_over:
                if ready:
                    self._run_in_host(*ready.popleft())
                elif timers and timers[0][0] <= until:
                    when, _, callback, args = heapq.heappop(timers)
                    self._now = max(self._now, when)
                    callback(*args)
                else:
                    return
                self.steps += 1
                after_step()
        finally:
            asyncio._set_running_loop(None)

    def _run_in_host(self, handle: asyncio.Handle, host: Host | None) -> None:
        if handle.cancelled() or (host is not None and host.is_dead):
            return
        if host is not None and host.stopped_until > self._now:
            self._at(host.stopped_until, self._run_in_host, handle, host)
        else:
            handle._run()

    def close_tasks(self, tasks: list[asyncio.Task[Any]]) -> None:
        """Close tasks where they wait, so that they run no further."""
        for task in tasks:
            if not task.done():
                # Cancelling would let the task continue, so its coroutine is closed instead.
                coroutine = task.get_coro()
                assert coroutine is not None
                try:
                    coroutine.close()
                except RuntimeError:
                    continue  # it awaits in a finally block; the loop drops it later
        tasks.clear()

    def close(self) -> None:
        """Close all remaining callbacks, timers and tasks."""
        self._ready.clear()
        self._timers.clear()
        self.close_tasks(self._tasks)
