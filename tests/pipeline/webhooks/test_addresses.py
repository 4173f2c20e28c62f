"""The addresses that a webhook may connect to."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.webhooks.addresses import AddressPolicy, is_public

OPEN = AddressPolicy([], is_encrypted=True)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_permitted(address: str) -> None:
    assert OPEN.permits(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:169.254.169.254",
        "::ffff:7f00:1",
        "::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2002:a00:1::5",
        "2001:0:53aa:64c:0:5efe:a00:1",
        "localhost",
        "",
        "2130706433",
    ],
)
def test_private_addresses_are_refused_in_every_disguise(address: str) -> None:
    assert not OPEN.permits(address)


@given(st.ip_addresses())
def test_no_address_counts_as_public_that_python_calls_private(address: object) -> None:
    made = ip_address(str(address))

    if made.is_private or made.is_loopback or made.is_link_local or made.is_multicast:
        assert not is_public(made)


def test_an_allowed_network_permits_itself_alone() -> None:
    policy = AddressPolicy([ip_network("10.1.0.0/16"), ip_network("fd00::/8")], is_encrypted=True)

    assert policy.permits("10.1.2.3")
    assert policy.permits("::ffff:10.1.2.3")
    assert policy.permits("fd00::1")
    assert not policy.permits("10.2.0.1")
    assert not policy.permits("127.0.0.1")
    assert policy.permits("8.8.8.8")


def test_without_tls_only_allowed_networks_count() -> None:
    policy = AddressPolicy([ip_network("10.1.0.0/16")], is_encrypted=False)

    assert policy.permits("10.1.2.3")
    assert not policy.permits("8.8.8.8")
