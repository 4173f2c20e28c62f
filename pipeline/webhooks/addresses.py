"""Addresses that a webhook may connect to: public ones, and networks that an endpoint names.

The check sees the very address of a connection, after the name is resolved. So a name that
resolves to another address a moment later changes nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

FORBIDDEN: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and the metadata of clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast tunnels
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "::/128",  # unspecified
        "::1/128",  # loopback
        "::/96",  # IPv4-compatible
        "64:ff9b:1::/48",  # translation of local addresses
        "100::/64",  # discard
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
        "5f00::/16",  # segment routing
        "fc00::/7",  # unique local
        "fe80::/10",  # link-local
        "fec0::/10",  # site-local
        "ff00::/8",  # multicast
    )
)
"""Networks that are not the public internet. Only an endpoint's own list can permit them."""

_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")


class ForbiddenAddressError(OSError):
    """The endpoint's host has no address that a webhook may connect to."""


def embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, else the address itself.

    >>> embedded(ipaddress.ip_address("::ffff:10.0.0.1"))
    IPv4Address('10.0.0.1')
    >>> embedded(ipaddress.ip_address("64:ff9b::a00:1"))
    IPv4Address('10.0.0.1')
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _TRANSLATED:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _6TO4:
        return ipaddress.IPv4Address(int(address) >> 80 & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    """Tell whether an address, and one that it stands for, is of the public internet."""
    meant = embedded(address)
    return not any(
        each in network
        for each in (address, meant)
        for network in FORBIDDEN
        if each.version == network.version
    )


@dataclass(frozen=True)
class AddressPolicy:
    """The addresses that an endpoint's connections may lead to.

    Attributes:
        allowed: networks that are permitted whatever they are.
        is_encrypted: whether the connection uses TLS; without it only ``allowed`` counts.
    """

    allowed: Sequence[Network]
    is_encrypted: bool

    def permits(self, text: str) -> bool:
        """Tell whether a connection to this address is permitted.

        >>> policy = AddressPolicy([ipaddress.ip_network("10.1.0.0/16")], is_encrypted=True)
        >>> [policy.permits(a) for a in ("10.1.2.3", "10.2.2.3", "8.8.8.8", "::ffff:127.0.0.1")]
        [True, False, True, False]
        """
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return False
        meant = embedded(address)
        if any(meant in network for network in self.allowed if network.version == meant.version):
            return True
        return self.is_encrypted and is_public(address)
