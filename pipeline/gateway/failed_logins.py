"""Rate limit of failed logins by address, in a gateway's own memory.

Nobody can guess a secret of 256 bits. The limit is for what guesses cost: a call of Redis for each
unknown key, and a line in the log.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

WINDOW_SECONDS = 60.0
"""Time in which a full allowance comes back."""

ADDRESSES_MAX = 10_000
"""Most addresses that are remembered. Beyond it the one that failed longest ago is forgotten."""

IPV6_PREFIX = 64
"""Bits of an IPv6 address that count: a network of one subscriber has all of the others."""


class FailedLogins:
    """Counts of failed logins, each with its time to be forgotten.

    This is the generic cell rate algorithm: an address may fail ``per_minute`` times at once, and
    the allowance comes back evenly.

    Args:
        per_minute: allowance of an address; 0: no limit.
        clock: monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # When the allowance of an address is whole again; the address that failed last is last.
        self._whole_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._whole_at)

    def wait_seconds(self, address: str) -> float:
        """Return how long until an address may fail again; 0: it may now."""
        whole_at = self._whole_at.get(network_of(address)) if self._whole_at else None
        if whole_at is None:
            return 0.0
        step = WINDOW_SECONDS / self._per_minute
        return max(0.0, whole_at - self._clock() + step - WINDOW_SECONDS)

    def count(self, address: str) -> bool:
        """Count a failed login.

        Returns:
            whether it was the last one that the address had left.
        """
        if not self._per_minute:
            return False
        now, network = self._clock(), network_of(address)
        step = WINDOW_SECONDS / self._per_minute
        before = max(self._whole_at.pop(network, now), now)
        whole_at = self._whole_at[network] = min(before + step, now + WINDOW_SECONDS)
        if len(self._whole_at) > ADDRESSES_MAX:
            self._whole_at.popitem(last=False)
        left_before = now + WINDOW_SECONDS - before >= step
        return left_before and now + WINDOW_SECONDS - whole_at < step


def network_of(address: str) -> str:
    """Return what counts as one address.

    >>> network_of("2001:db8:1:2:3::4")
    '2001:db8:1:2::'
    >>> network_of("::ffff:192.0.2.1")
    '192.0.2.1'
    """
    try:
        found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:  # a socket's path, or none
        return address
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if isinstance(found, IPv4Address):
        return str(found)
    host_bits = 128 - IPV6_PREFIX
    return str(IPv6Address(int(found) >> host_bits << host_bits))
