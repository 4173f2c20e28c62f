"""Records of the audit topic."""

from __future__ import annotations

from typing import Literal

import msgspec

Act = Literal["label_posted", "key_added", "key_revoked", "key_removed"]


class AuditRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One record of the audit topic (JSON, UTF-8); its key is ``act_id``.

    Attributes:
        act_id: joins the two records of an act.
        act: what was done.
        result: ``begun``, ``done`` or ``failed``.
        at: time of the record, RFC 3339.
        principal_kind: ``api_key``, ``jwt`` or ``command``.
        principal_id: the key's public id, the JWT's subject, or the command's user.
        principal_name: the key's name.
        request_id: the request's id; a command has none.
        transaction_hash: hash that stands for the transaction, hexadecimal.
        key_id, key_name: the key that was added, revoked or removed.
        reason: why the act failed: a problem's name or an error's class.
    """

    act_id: str
    act: Act
    result: Literal["begun", "done", "failed"]
    at: str
    principal_kind: str
    principal_id: str
    principal_name: str
    request_id: str | None = None
    transaction_hash: str | None = None
    key_id: str | None = None
    key_name: str | None = None
    reason: str | None = None
