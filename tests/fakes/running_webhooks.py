"""`recur webhooks` as a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def webhooks_process(
    options: Mapping[str, Any], log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the process with these settings; kill it at the end if it runs.

    Args:
        options: settings by name.
        log: file to which its output is appended.
    """
    environment = {f"RECUR_{name.upper()}": str(value) for name, value in options.items()}
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pipeline.cli.main", "webhooks",
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=file, stderr=file,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
