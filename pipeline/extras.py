"""Packages of the optional extras, and one line that says which extra to install."""

from __future__ import annotations

from importlib.util import find_spec

from pipeline.errors import StartupError

GATEWAY_PACKAGES = ("litestar", "uvicorn")
"""Packages of the extra `gateway`."""


def require_gateway_packages(user: str) -> None:
    """Check that the extra `gateway` is installed.

    Args:
        user: what needs it, for the message.

    Raises:
        StartupError: a package is missing.
    """
    for name in GATEWAY_PACKAGES:
        if find_spec(name) is None:
            raise StartupError(f"{user} needs the package {name}: pip install 'recur[gateway]'")
