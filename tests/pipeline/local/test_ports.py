"""A free port goes to one process only."""

from __future__ import annotations

import subprocess
import sys

from pipeline.local.ports import free_port


def test_a_port_is_given_to_one_process_only() -> None:
    """Parallel tests ask for ports before anything listens on them."""
    port = free_port()
    script = (
        "from pipeline.local import ports\n"
        f"ports.PORTS = range({port}, {port + 1})\n"
        "try:\n    print(ports.free_port())\n"
        "except ports.ServiceError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, check=True)

    assert found.stdout.startswith("no port from")
