"""Tenants: a key with a tenant's prefix sees only ids that begin with it.

Whatever lies outside is answered as if it did not exist. A client learns nothing from the time of
the answer: the prefix is its own, so it knows which ids lie outside.
"""

from __future__ import annotations

from pipeline.gateway.principal import Principal
from pipeline.gateway.problems import NOT_FOUND, Problem


def sees(
    principal: Principal, *, account_id: str | None = None, transaction_id: str | None = None
) -> bool:
    """Tell whether a principal sees an account, a transaction, or the two together."""
    tenant = principal.tenant
    if tenant is None:
        return True
    return all(an_id is None or an_id.startswith(tenant) for an_id in (account_id, transaction_id))


def not_found() -> Problem:
    """Make the one problem for what does not exist and for what a tenant may not see.

    Handlers raise nothing else for a missing account or transaction, so the two look the same.
    """
    return Problem(NOT_FOUND)


def check_seen(
    principal: Principal, *, account_id: str | None = None, transaction_id: str | None = None
) -> None:
    """Refuse ids outside of the principal's tenant.

    Raises:
        Problem: 404.
    """
    if not sees(principal, account_id=account_id, transaction_id=transaction_id):
        raise not_found()
