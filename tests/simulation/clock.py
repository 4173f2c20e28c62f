"""An event loop whose clock jumps to the next thing that happens, and processes that can stop.

Everything of a run is in one thread and in an order that its seed decides: callbacks that are
ready run first come, first served, as in asyncio's own loop, and timers by their time. What runs
in a process (:class:`Host`) runs no further once it is dead, and later once it is stopped.
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
    """A process.

    Attributes:
        name: for the trace.
        is_dead: nothing of it runs any more.
        stopped_until: nothing of it runs before, seconds.
        held: share of what it sends and is sent that is held on its way.
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
        """Run a coroutine in this process, with all that it starts."""
        return loop.create_task(work, context=self._context)


_HOST: ContextVar[Host | None] = ContextVar("host", default=None)


class Loop(asyncio.AbstractEventLoop):
    """The loop of one run.

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

    # what asyncio asks of a loop ---------------------------------------------------------

    def time(self) -> float:
        """Seconds since the run began."""
        return self._now

    def get_debug(self) -> bool:
        """Never."""
        return False

    def is_running(self) -> bool:
        """Always, while a run lasts."""
        return True

    def is_closed(self) -> bool:
        """Never."""
        return False

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Call it next."""
        context = context or copy_context()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, context.get(_HOST)))
        return handle

    call_soon_threadsafe = call_soon  # there is one thread

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call it so many seconds from now."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call it then."""
        context = context or copy_context()
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        host = context.get(_HOST)
        self._at(when, self._run_in_host, handle, host)
        return handle

    def _at(self, when: float, callback: Callable[..., object], *args: object) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), callback, args))

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when their time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """A task of the process that asks for it, or that ``context`` names."""
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name, context=context)
        host = (context or copy_context()).get(_HOST)
        (self._tasks if host is None else host.tasks).append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Errors of callbacks are the simulator's own; a task's are seen by who awaits it."""
        if "handle" in context:
            raise SystemExit(f"{context['message']}: {context['exception']!r}") from context[
                "exception"
            ]

    # running -----------------------------------------------------------------------------

    def soon(self, callback: Callable[..., object], *args: object) -> None:
        """Call it next, in no process."""
        self.later(0.0, callback, *args)

    def later(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        """Call it so many seconds from now, in no process."""
        self._at(self._now + delay, callback, *args)

    def run(self, until: float) -> None:
        """Run until ``is_over`` is set, nothing is left to do, or the clock is at ``until``."""
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
        """End them where they wait: nothing of them runs any more."""
        for task in tasks:
            if not task.done():
                # They were waiting, with nobody left to say anything to.
                coroutine = task.get_coro()
                assert coroutine is not None
                try:
                    coroutine.close()
                except RuntimeError:
                    continue  # it awaits in its finally: it goes with the loop
        tasks.clear()

    def close(self) -> None:
        """End what is left."""
        self._ready.clear()
        self._timers.clear()
        self.close_tasks(self._tasks)
