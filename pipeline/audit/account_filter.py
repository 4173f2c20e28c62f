"""Filters of the accounts to recompute: all, one, or a sample that is the same in every run."""

from __future__ import annotations

from heapq import heappush, heapreplace
from typing import Protocol

import xxhash


class AccountFilter(Protocol):
    """Filter of accounts by the keys of their records: account ids in UTF-8."""

    def admit(self, key: bytes) -> bool:
        """Check a transaction's account; a sample may add the account by this call."""

    def selects(self, key: bytes) -> bool:
        """Check whether the account is selected, or would be after its next transaction."""

    def freeze(self) -> None:
        """Select no further accounts."""


class AllAccounts:
    """Filter that selects all accounts."""

    def admit(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return True

    def selects(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return True

    def freeze(self) -> None:
        """See :class:`AccountFilter`: a new account is selected even later."""


class SingleAccount:
    """Filter that selects one account."""

    def __init__(self, account_id: str) -> None:
        self._key = account_id.encode()

    def admit(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return key == self._key

    def selects(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        return key == self._key

    def freeze(self) -> None:
        """See :class:`AccountFilter`: there is no further account."""


class SampledAccounts:
    """Filter that selects the accounts whose ids have the smallest hashes so far.

    The largest selected hash only falls. So an account is selected at its first transaction or
    never, and an account that stays selected was admitted at each of its transactions.

    Args:
        accounts: size of the sample.

    >>> sample = SampledAccounts(1)
    >>> sample.admit(b"A1"), sample.admit(b"A2"), sample.admit(b"A3")
    (True, False, True)
    >>> sample.selects(b"A1")
    False
    """

    def __init__(self, accounts: int) -> None:
        self._accounts = accounts
        self._hashes: set[int] = set()
        self._heap: list[int] = []  # negated hashes: the largest one comes first
        self._is_frozen = False

    def admit(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        number = xxhash.xxh3_64_intdigest(key)
        if number in self._hashes:
            return True
        if self._is_frozen:
            return False
        if len(self._hashes) < self._accounts:
            heappush(self._heap, -number)
        elif self._heap and number < -self._heap[0]:
            self._hashes.remove(-heapreplace(self._heap, -number))
        else:
            return False
        self._hashes.add(number)
        return True

    def selects(self, key: bytes) -> bool:
        """See :class:`AccountFilter`."""
        if len(self._hashes) < self._accounts:
            return True
        return bool(self._heap) and xxhash.xxh3_64_intdigest(key) <= -self._heap[0]

    def freeze(self) -> None:
        """See :class:`AccountFilter`."""
        self._is_frozen = True
