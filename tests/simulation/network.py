"""Network between workers and services: delays, errors and lost answers.

A request arrives after a delay. Its effects happen at the service one after another, each at its
own moment. The answer arrives after another delay. The network draws a :class:`Fate` for each
request. An effect that was sent happens even if its sender dies.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count
from random import Random
from typing import Any, TypeVar

from tests.simulation.clock import Host, Loop

T = TypeVar("T")

USUAL_SECONDS = 0.02
"""Longest usual delay of a message from or to a service."""

SLOW_SECONDS = 12.0
"""Longest delay of a slow message, longer than a session timeout."""

HELD_EFFECTS = 40
"""Largest number of other effects before the network releases a held message."""

HELD_SECONDS = 35.0
"""Longest time before the network releases a held message without other effects."""


class Fate(Enum):
    """Outcome of a request."""

    ANSWERED = "answered"
    LOST = "lost"  # no effect; an error
    PARTIAL = "partial"  # some effects; an error
    UNANSWERED = "unanswered"  # all effects; an error
    LATE = "late"  # an error, and all effects before or after it


class UnexpectedError(Exception):
    """Error that no code expects, such as a library's defect or a lack of memory."""


@dataclass
class Faults:
    """Share of requests for each kind of fault."""

    slow: float = 0.0
    held: float = 0.0
    lost: float = 0.0
    partial: float = 0.0
    unanswered: float = 0.0
    late: float = 0.0
    unexpected: float = 0.0

    def end(self) -> None:
        """Stop all faults."""
        self.slow = self.held = self.lost = self.partial = 0.0
        self.unanswered = self.late = self.unexpected = 0.0


class Network:
    """Network between all workers and all services.

    Args:
        on_effect: called before each effect.
        note: writes to the trace; None without a trace.

    Attributes:
        effects: number of effects so far.
    """

    def __init__(
        self,
        loop: Loop,
        rng: Random,
        faults: Faults,
        on_effect: Callable[[], None],
        note: Callable[[str], None] | None,
    ) -> None:
        self._loop = loop
        self._rng = rng
        self._faults = faults
        self._on_effect = on_effect
        self._note = note
        self._held: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = count()
        self.effects = 0

    def delay(self) -> float:
        """Draw the delay of a message in seconds."""
        if self._rng.random() < self._faults.slow:
            return self._rng.uniform(USUAL_SECONDS, SLOW_SECONDS)
        return self._rng.random() * USUAL_SECONDS

    def send(self, host: Host, arrive: Callable[[], None]) -> None:
        """Deliver a message from or to a host after a delay.

        The delay is a time, or a number of effects of other requests.
        """
        if self._rng.random() >= max(self._faults.held, host.held):
            self._loop.later(self.delay(), arrive)
            return
        due = self.effects + self._rng.randint(1, HELD_EFFECTS)
        held = due, next(self._numbers), arrive
        heapq.heappush(self._held, held)
        self._loop.later(HELD_SECONDS, self._release, held)

    def _release(self, held: tuple[int, int, Callable[[], None]]) -> None:
        if held in self._held:
            self._held.remove(held)
            heapq.heapify(self._held)
            held[2]()

    async def cross(self, host: Host) -> None:
        """Wait for a message between two threads of a process."""
        crossed = self._loop.create_future()
        self.send(host, lambda: None if crossed.done() else crossed.set_result(None))
        await crossed

    def _fate(self) -> Fate:
        faults, chance = self._faults, self._rng.random()
        for fate, share in (
            (Fate.LOST, faults.lost),
            (Fate.PARTIAL, faults.partial),
            (Fate.UNANSWERED, faults.unanswered),
            (Fate.LATE, faults.late),
        ):
            if chance < share:
                return fate
            chance -= share
        return Fate.ANSWERED

    async def ask(
        self,
        host: Host,
        name: str,
        effects: Sequence[Callable[[], T]],
        error: Callable[[str], Exception],
    ) -> list[T]:
        """Send a request and wait for its answer.

        Args:
            host: the process that sends the request.
            name: the request's name in the trace.
            effects: the request's effects at the service, in order.
            error: makes the error that is raised if no answer arrives.

        Returns:
            the result of each effect.
        """
        if host.is_dead:  # its tasks are closed, but one may still ask in a finally block
            raise UnexpectedError("a dead process asks")
        answer: asyncio.Future[list[T]] = self._loop.create_future()
        request = _Request(self, host, name, list(effects), self._fate(), answer, error)
        if request.fate is Fate.LATE:
            self._loop.later(self.delay(), request.fail)
        self.send(host, request.arrive)
        return await answer

    def unexpected(self) -> bool:
        """Draw whether a request ends in an error that no code expects."""
        return self._rng.random() < self._faults.unexpected

    def some(self, most: int) -> int:
        """Draw how many effects of an interrupted request happen."""
        return self._rng.randrange(most)

    def happens(self, host: Host, name: str) -> None:
        """Count an effect that is about to happen and release messages that are due."""
        self.effects += 1
        while self._held and self._held[0][0] <= self.effects:
            self._loop.soon(heapq.heappop(self._held)[2])
        if self._note is not None:
            self._note(f"{host.name}{' (dead)' if host.is_dead else ''}: {name}")
        self._on_effect()

    def note_end(self, host: Host, name: str, fate: Fate) -> None:
        """Write a request's fate to the trace, unless it was answered."""
        if self._note is not None and fate is not Fate.ANSWERED:
            self._note(f"{host.name}: {name}: {fate.value}")


class _Request:
    """A request in flight."""

    def __init__(
        self,
        network: Network,
        host: Host,
        name: str,
        effects: list[Callable[[], Any]],
        fate: Fate,
        answer: asyncio.Future[list[Any]],
        error: Callable[[str], Exception],
    ) -> None:
        self.fate = fate
        self._network = network
        self._loop = network._loop
        self._host = host
        self._name = name
        self._effects = effects
        self._answer = answer
        self._error = error
        self._results: list[Any] = []
        self._left = len(effects)
        if fate is Fate.LOST:
            self._left = 0
        elif fate is Fate.PARTIAL and effects:
            self._left = network.some(len(effects))

    def arrive(self) -> None:
        """Apply the next effect, then schedule the others or the answer."""
        if self._left:
            self._left -= 1
            self._network.happens(self._host, self._name)
            self._results.append(self._effects[len(self._results)]())
        if self._left:
            self._loop.later(self._network.delay() / 8, self.arrive)
        elif self.fate is Fate.ANSWERED:
            self._network.send(self._host, self._succeed)
        elif self.fate is not Fate.LATE:
            self._network.send(self._host, self.fail)

    def _succeed(self) -> None:
        if not self._answer.done():
            if self._network.unexpected():
                self._answer.set_exception(UnexpectedError(self._name))
            else:
                self._answer.set_result(self._results)

    def fail(self) -> None:
        """Raise the request's error at its sender."""
        self._network.note_end(self._host, self._name, self.fate)
        if not self._answer.done():
            self._answer.set_exception(self._error(self._name))
