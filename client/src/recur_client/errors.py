"""Errors of the client."""

from __future__ import annotations

from dataclasses import dataclass


class RecurClientError(Exception):
    """Any error of a call."""


@dataclass(frozen=True)
class FieldProblem:
    """A wrong field, parameter or header of a request.

    Attributes:
        detail: what is wrong.
        pointer: JSON pointer to the field of the body.
        parameter: name of the parameter.
        header: name of the header.
    """

    detail: str
    pointer: str | None = None
    parameter: str | None = None
    header: str | None = None


class ProblemError(RecurClientError):
    """The gateway answered with an error (RFC 9457).

    Attributes:
        status: the HTTP status.
        kind: last part of the problem's type, such as ``conflict``; "" if there is none.
        title: what happened.
        detail: more about this request.
        request_id: id in the gateway's log.
        reason: why a transaction was rejected.
        errors: the wrong fields.
    """

    def __init__(
        self,
        status: int,
        kind: str = "",
        title: str = "",
        detail: str = "",
        request_id: str = "",
        reason: str = "",
        errors: tuple[FieldProblem, ...] = (),
    ) -> None:
        places = [e.pointer or e.parameter or e.header or "" for e in errors]
        where = f" ({', '.join(filter(None, places))})" if any(places) else ""
        super().__init__(f"{status} {title or kind}{where}")
        self.status, self.kind, self.title, self.detail = status, kind, title, detail
        self.request_id, self.reason, self.errors = request_id, reason, errors


class DeadlineError(RecurClientError):
    """The call's time is over; a transaction may or may not be accepted: send it again."""


class PendingError(DeadlineError):
    """A transaction is accepted, and its score did not come within the call's time.

    Attributes:
        location: path of the score.
    """

    def __init__(self, location: str) -> None:
        super().__init__("the score is pending; ask for it again")
        self.location = location


class ConnectionLostError(RecurClientError):
    """No attempt of the call reached the gateway and came back."""
