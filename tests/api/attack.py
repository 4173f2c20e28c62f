"""Runs of Schemathesis against a gateway, in a process of their own."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
RUN_SECONDS_MAX = 3_600.0


@dataclass(frozen=True)
class Attack:
    """Result of a run.

    Attributes:
        requests: number of requests.
        status: exit status; 0: nothing was found.
        output: what Schemathesis printed.
    """

    requests: int
    status: int
    output: str


async def attack(
    address: str, token: str, examples: int, *, phases: str = "examples,fuzzing", seed: int = 1
) -> Attack:
    """Send requests to a gateway, and check its answers against its document.

    Args:
        address: the gateway's.
        token: of a key with all scopes and no rate limit.
        examples: most requests for each operation in the fuzzing phase.
        phases: Schemathesis's phases.
        seed: of the requests.
    """
    command = [
        *(sys.executable, "-c", "import schemathesis.cli as c; c.schemathesis()"),
        *("--config-file", str(FOLDER / "schemathesis.toml"), "run", f"{address}/openapi.json"),
        *("--header", f"Authorization: Bearer {token}", "--phases", phases),
        *("--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure"),
        *("--generation-database", "none", "--no-color", "--request-timeout", "60"),
        *("--suppress-health-check", "all"),
    ]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.api.hooks", "NO_PROXY": "*"}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        cwd=FOLDER.parents[1],
    )
    try:
        async with asyncio.timeout(RUN_SECONDS_MAX):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    output = printed.decode(errors="replace")
    found = re.search(r"([\d,]+) generated", output)
    requests = int(found[1].replace(",", "")) if found else 0
    assert process.returncode is not None
    return Attack(requests, process.returncode, output)
