"""Client of a Recur gateway."""

from recur_client.client import AsyncClient, Client
from recur_client.errors import (
    ConnectionLostError,
    DeadlineError,
    FieldProblem,
    PendingError,
    ProblemError,
    RecurClientError,
)
from recur_client.webhooks import WebhookError, WebhookVerifier

__all__ = [
    "AsyncClient",
    "Client",
    "ConnectionLostError",
    "DeadlineError",
    "FieldProblem",
    "PendingError",
    "ProblemError",
    "RecurClientError",
    "WebhookError",
    "WebhookVerifier",
]
