"""Output of `recur verify`: text for a person, and JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from pipeline.audit.result import Difference, Verification
from pipeline.audit.verifier import VerifyOptions, verify
from pipeline.checkpoint import load_checkpoint
from pipeline.errors import SettingsError
from pipeline.progress import Bar
from pipeline.settings import Settings
from pipeline.tables import pair_lines

NAMED_MAX = 20
"""Most accounts of each kind that are printed; --json has more."""


def run_verify(
    options: VerifyOptions,
    settings: Settings,
    json_file: Path | None = None,
    console: Console | None = None,
) -> int:
    """Verify, print the findings, and write them as JSON.

    Returns:
        0 if nothing contradicts the log, else 1.

    Raises:
        RecurError: verifying is not possible; the message says what to do.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    checkpoint = load_checkpoint(settings)
    started = time.monotonic()
    with Bar(Console(stderr=True, highlight=False)) as bar:
        found = asyncio.run(verify(settings, checkpoint, options, bar))
    seconds = time.monotonic() - started
    for line in describe(found, options, checkpoint.digest, seconds):
        console.print(line, markup=False)
    if json_file is not None:
        try:
            json_file.write_bytes(to_json(found, options, checkpoint.digest, seconds))
        except OSError as error:
            raise SettingsError(f"--json: cannot write {json_file} ({error.strerror})") from error
    return 0 if found.is_right else 1


def describe(
    found: Verification, options: VerifyOptions, model: str, seconds: float
) -> Iterator[str]:
    """Yield lines for a person to read."""
    yield f"states and scores of model {model} against the log"
    rate = found.records / seconds if seconds else 0.0
    rows = [
        (
            "log",
            f"{found.records:,} records up to the watermarks, {found.transactions:,} transactions"
            f" of these accounts, in {seconds:.1f} s ({rate:,.0f}/s); {found.not_applied:,} records"
            " are not applied yet",
        ),
        (
            "accounts",
            f"{found.accounts:,} checked, {found.right:,} right, {found.different_accounts:,}"
            f" different; {found.unverifiable_accounts:,} unverifiable, {found.expired:,} expired",
        ),
        ("largest |Δh|", f"{found.largest_hidden:.2g} (tolerance {options.tolerance_hidden:g})"),
        ("largest |Δscore|", f"{found.largest_score:.2g} (tolerance {options.tolerance_score:g})"),
        (
            "scores",
            f"{found.scores:,} compared; {found.missing:,} missing{_first(found.first_missing)},"
            f" {found.duplicate:,} duplicate, {found.conflicting:,} conflicting"
            f"{_first(found.first_conflicting)}",
        ),
        ("unverifiable", f"{found.unverifiable_scores:,} scores"),
        ("states without log", _without_log(found)),
    ]
    if found.unexpected:
        rows.append(("not due", f"{found.unexpected:,} scores of rejected or repeated records"))
    if found.foreign_model:
        rows.append(("other models", f"{found.foreign_model:,} scores, not compared"))
    if found.lost_partitions:
        named = ", ".join(map(str, found.lost_partitions))
        rows.append(
            ("no watermark", f"partition {named} has published scores: Redis lost its watermark")
        )
    rows.append(("result", _result(found)))
    yield from pair_lines(rows, align_right=True)
    yield from _named_differences(found)
    yield from _named_unverifiable(found)


def _first(position: tuple[int, int] | None) -> str:
    if position is None:
        return ""
    return f" (first: partition {position[0]}, offset {position[1]})"


def _without_log(found: Verification) -> str:
    if found.without_log is None:
        return "not searched: Redis does not allow its user SCAN (grant +scan)"
    return f"{found.without_log:,}"


def _result(found: Verification) -> str:
    if not found.is_right:
        return "NOT what the log says"
    if found.unverifiable_accounts or found.unverifiable_scores:
        return "all that can be verified is what the log says"
    return "exactly what the log says"


def _named_differences(found: Verification) -> Iterator[str]:
    if not found.differences:
        return
    yield "accounts that differ:"
    for difference in found.differences[:NAMED_MAX]:
        name = f"{difference.account_id} (partition {difference.partition})"
        yield f"  {name}: {_difference_text(difference)}"
    if found.different_accounts > NAMED_MAX:
        yield f"  and {found.different_accounts - NAMED_MAX:,} more"


def _difference_text(difference: Difference) -> str:
    parts = [difference.what]
    if difference.offset is not None:
        parts.append(f"begins at offset {difference.offset}")
    else:
        parts.append("the state alone: no score shows since when")
    if difference.hidden is not None:
        parts.append(f"|Δh| {difference.hidden:.2g}")
    if difference.score is not None:
        parts.append(f"|Δscore| {difference.score:.2g}")
    return "; ".join(parts)


def _named_unverifiable(found: Verification) -> Iterator[str]:
    if not found.unverifiable:
        return
    yield "accounts that cannot be verified:"
    for account, partition, why in found.unverifiable[:NAMED_MAX]:
        yield f"  {account} (partition {partition}): {why}"
    if found.unverifiable_accounts > NAMED_MAX:
        yield f"  and {found.unverifiable_accounts - NAMED_MAX:,} more"


def to_json(found: Verification, options: VerifyOptions, model: str, seconds: float) -> bytes:
    """Encode the findings and the options as JSON."""
    report = {
        "model": model,
        "right": found.is_right,
        "seconds": round(seconds, 3),
        "options": msgspec.to_builtins(options),
        "found": msgspec.to_builtins(found),
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
