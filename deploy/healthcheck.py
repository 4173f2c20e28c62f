"""Ask the worker in this container how it is: ``healthcheck.py live`` or ``healthcheck.py ready``.

Exit code 0 when the worker answers 200, else 1 with a line that says what it answered.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_SECONDS = 3.0


def main(question: str) -> str | None:
    """Say what is wrong, or return None."""
    port_text = os.environ.get("RECUR_HTTP_PORT", "")
    # Kubernetes sets it to tcp://10.0.0.1:9100 if a service is named recur-http.
    port = int(port_text) if port_text.isdecimal() else 9100
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", f"/{question}")
        response = connection.getresponse()
        body = response.read(500).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return f"/{question} on port {port}: {error}"
    finally:
        connection.close()
    return None if response.status == 200 else f"/{question}: {response.status} {body}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
