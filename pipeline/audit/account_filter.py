"""Which accounts a computation looks at: all, one, or a sample that is the same in every run."""

from __future__ import annotations

from heapq import heappush, heapreplace
from typing import Protocol

import xxhash


class AccountFilter(Protocol):
    """Chooses accounts by the keys of their records, which are their ids in UTF-8."""

    def takes(self, key: bytes) -> bool:
        """Whether a transaction of the account is looked at; for a sample, it may join by it."""

    def wants(self, key: bytes) -> bool:
        """Whether the account is chosen, or would be once a transaction of it is seen."""

    def settle(self) -> None:
        """Take no further accounts."""


class AllAccounts:
    """All accounts."""

    def takes(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return True

    def wants(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return True

    def settle(self) -> None:
        """See :class:`AccountFilter`: an account that begins later is taken, too."""


class One:
    """A single account."""

    def __init__(self, account_id: str) -> None:
        self._key = account_id.encode()

    def takes(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return key == self._key

    def wants(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return key == self._key

    def settle(self) -> None:
        """See :class:`AccountFilter`: there is no further one."""


class Sample:
    """The accounts whose ids have the smallest hashes, of those seen so far.

    The bound only falls, so an account is chosen at its first transaction or never, and one
    that stays was never missed.

    Args:
        accounts: how many.

    >>> sample = Sample(1)
    >>> sample.takes(b"A1"), sample.takes(b"A2"), sample.takes(b"A3")
    (True, False, True)
    >>> sample.wants(b"A1")
    False
    """

    def __init__(self, accounts: int) -> None:
        self._accounts = accounts
        self._chosen: set[int] = set()
        self._largest: list[int] = []  # a heap of the chosen, negated
        self._is_settled = False

    def takes(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        number = xxhash.xxh3_64_intdigest(key)
        if number in self._chosen:
            return True
        if self._is_settled:
            return False
        if len(self._chosen) < self._accounts:
            heappush(self._largest, -number)
        elif self._largest and number < -self._largest[0]:
            self._chosen.remove(-heapreplace(self._largest, -number))
        else:
            return False
        self._chosen.add(number)
        return True

    def wants(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        if len(self._chosen) < self._accounts:
            return True
        return bool(self._largest) and xxhash.xxh3_64_intdigest(key) <= -self._largest[0]

    def settle(self) -> None:
        """See :class:`AccountFilter`."""
        self._is_settled = True
