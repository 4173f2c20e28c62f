"""Errors, grouped by what a person has to do about them.

    RecurError
     ├── SettingsError      a setting is wrong or missing: correct it and start again
     ├── StartupError       broker, Redis, checkpoint or log cannot be used: the message says
     │                      what to do
     ├── ServiceError       an embedded service (demo, tests) did not start
     └── RejectedError      a record cannot be scored: it goes to the dead-letter topic

A message says what was wrong, where, and what to do. It never holds a payload, an account
number or a secret.
"""

from __future__ import annotations


class RecurError(Exception):
    """Base of all errors that Recur raises on purpose."""


class SettingsError(RecurError):
    """A setting is wrong. The message names it."""


class StartupError(RecurError):
    """The worker must not start. The message says what to do."""


class ServiceError(RecurError):
    """An embedded service did not start or died."""


class RejectedError(RecurError):
    """A record cannot be scored.

    Attributes:
        reason: one of :data:`pipeline.messages.decoding.REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
