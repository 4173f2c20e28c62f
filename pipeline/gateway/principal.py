"""Principals: the owners of credentials, and the scopes and tenants that bound them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, get_args

Scope = Literal["score", "label", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

TENANT = re.compile(r"[A-Za-z0-9._:-]{0,63}[._:-]")
"""A tenant's prefix. It ends with a separator, so that acme- does not see what acme2- owns."""

SUBJECT_MAX_CHARACTERS = 255
"""Longest subject of a JWT, as OpenID Connect has it."""


@dataclass(frozen=True)
class Principal:
    """The owner of the credentials of a request.

    Attributes:
        kind: an API key, a JWT's subject, or the user of a command.
        id: the key's public id, the subject, or the user's name.
        name: the key's name; the subject or the user's name for the others.
        scopes: what they may do.
        tenant: prefix of the accounts and transactions that they see; None: all of them.
        rate: the key's own rate limit, such as ``100/s``; None: the gateway's default.
    """

    kind: Literal["api_key", "jwt", "command"]
    id: str
    name: str
    scopes: frozenset[str]
    tenant: str | None = None
    rate: str | None = None

    @property
    def label(self) -> str:
        """A short name for logs and Redis keys, without personal data.

        An API key's public id; a subject's hash, because a subject may be an e-mail address.
        """
        if self.kind == "api_key":
            return self.id
        return f"{self.kind}-{hashlib.blake2b(self.id.encode(), digest_size=8).hexdigest()}"
