"""The commands `recur keys ...`: add, list, show, revoke and remove the gateways' API keys."""

from __future__ import annotations

import asyncio
import getpass
import re
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from model.units import DAY_MS, HOUR_MS, MINUTE_MS
from pipeline.errors import SettingsError
from pipeline.settings import load_settings

if TYPE_CHECKING:
    from pipeline.gateway.api_keys import ApiKey, ApiKeyStore
    from pipeline.messages.audit_records import Act

T = TypeVar("T")

SCOPE_NAMES = ("score", "label", "read", "admin")
_DURATION_MS = {"min": MINUTE_MS, "h": HOUR_MS, "d": DAY_MS}
EXPIRY_MAX_DAYS = 36_500

unaudited_option = click.option(
    "--unaudited", is_flag=True, help="Revoke at once, without an audit record: Kafka is away."
)


@click.group()
def keys() -> None:
    """Manage the API keys of gateways. Changes take effect within a second, without a restart."""


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPE_NAMES),
    multiple=True,
    required=True,
    help="What the key may do; one or more.",
)
@click.option("--tenant", metavar="PREFIX", help="Only accounts and transactions that begin so.")
@click.option(
    "--expires", metavar="TIME", help="90d, 12h, 30min, 2027-05-31T00:00:00Z; default: never."
)
@click.option("--rate", metavar="RATE", help="100/s, 6000/min, or none; default: the gateway's.")
def add(
    name: str, scopes: tuple[str, ...], tenant: str | None, expires: str | None, rate: str | None
) -> None:
    """Add a key called NAME, and print its token. Nothing can print it again."""
    from pipeline.gateway.api_keys import new_key

    now_ms = time.time_ns() // 1_000_000
    expires_ms = None if expires is None else expiry_ms(expires, now_ms)
    key, token = new_key(
        name, scopes, tenant=tenant, rate=rate, expires_ms=expires_ms, now_ms=now_ms
    )
    _run(lambda store: store.add(key), "key_added", key.id, key.name)
    click.echo(token)
    click.echo(f"key {key.id} ({key.name}): keep the token, it is not shown again", err=True)


@keys.command("list")
def list_keys() -> None:
    """List all keys, the oldest first. No line holds a secret."""
    found = _run(lambda store: store.all())
    now_ms = time.time_ns() // 1_000_000
    for key in found:
        click.echo("  ".join((key.id, f"{key.state(now_ms):8}", ",".join(key.scopes), key.name)))
    if not found:
        click.echo("no keys; add one with `recur keys add`", err=True)


@keys.command()
@click.argument("key_id", metavar="ID")
def show(key_id: str) -> None:
    """Show the key ID: everything but its secret, which Recur does not know."""
    for line in describe_key(_existing(key_id), time.time_ns() // 1_000_000):
        click.echo(line)


@keys.command()
@click.argument("key_id", metavar="ID")
@unaudited_option
def revoke(key_id: str, unaudited: bool) -> None:
    """Revoke the key ID for good. Gateways refuse it within a second."""
    name = _existing(key_id).name
    if unaudited:
        _run(lambda store: store.revoke(key_id))
        click.echo("the audit topic has no record of this", err=True)
    else:
        _run(lambda store: store.revoke(key_id), "key_revoked", key_id, name)
    click.echo(f"key {key_id} ({name}) is revoked")


@keys.command()
@click.argument("key_id", metavar="ID")
def remove(key_id: str) -> None:
    """Delete the record of the key ID, which is revoked or expired."""
    name = _existing(key_id).name
    _run(lambda store: store.remove(key_id), "key_removed", key_id, name)
    click.echo(f"key {key_id} ({name}) is removed")


def describe_key(key: ApiKey, now_ms: int) -> list[str]:
    """Describe a key in lines, without its secret's hash."""
    return [
        f"id       {key.id}",
        f"name     {key.name}",
        f"state    {key.state(now_ms)}",
        f"scopes   {', '.join(key.scopes)}",
        f"tenant   {key.tenant or '- (all accounts)'}",
        f"rate     {key.rate or '- (the gateways default)'}",
        f"created  {_time(key.created_ms)}",
        f"expires  {_time(key.expires_ms)}",
        f"revoked  {_time(key.revoked_ms)}",
    ]


def expiry_ms(text: str, now_ms: int) -> int:
    """Read a time of expiry, epoch milliseconds: a duration from now, or a time.

    Raises:
        SettingsError: the text is neither.

    >>> expiry_ms("90d", 0)
    7776000000
    """
    from pipeline.timestamps import epoch_ms_of

    duration = re.fullmatch(r"(\d{1,8})(min|h|d)", text)
    if duration is None:
        return epoch_ms_of(text, "--expires")
    milliseconds = int(duration[1]) * _DURATION_MS[duration[2]]
    if milliseconds > EXPIRY_MAX_DAYS * _DURATION_MS["d"]:
        raise SettingsError(f"--expires: at most {EXPIRY_MAX_DAYS}d")
    return now_ms + milliseconds


def _time(epoch_ms: int | None) -> str:
    if epoch_ms is None:
        return "-"
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch_ms / 1000))


def _existing(key_id: str) -> ApiKey:
    """Return a key.

    Raises:
        ApiKeyError: there is no such key.
    """
    from pipeline.gateway.api_keys import ApiKeyError

    key = _run(lambda store: store.get(key_id))
    if key is None:
        raise ApiKeyError(f"there is no key {key_id[:64]!a}: `recur keys list` lists them")
    return key


def _run(
    use: Callable[[ApiKeyStore], Awaitable[T]],
    act: Act | None = None,
    key_id: str | None = None,
    key_name: str | None = None,
) -> T:
    """Use the store; write audit records around it if it is an act."""
    return asyncio.run(_use(use, act, key_id, key_name))


async def _use(
    use: Callable[[ApiKeyStore], Awaitable[T]],
    act: Act | None,
    key_id: str | None,
    key_name: str | None,
) -> T:
    from pipeline.errors import RecurError
    from pipeline.gateway.api_keys import api_key_store
    from pipeline.gateway.audit import AuditLog
    from pipeline.gateway.principal import Principal
    from pipeline.storage.client import StoreUnavailableError

    settings = load_settings()
    audit = AuditLog(settings)
    async with api_key_store(settings) as store:
        try:
            if act is None:
                return await use(store)
            await audit.start()
            user = getpass.getuser()
            person = Principal("command", user, user, frozenset())
            async with audit.act(act, person, key_id=key_id, key_name=key_name):
                return await use(store)
        except StoreUnavailableError as error:
            raise RecurError(
                f"Redis does not answer about API keys ({error}): see that it is up, and that"
                " RECUR_REDIS_URL is right"
            ) from error
        finally:
            await audit.stop()
