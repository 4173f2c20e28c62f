"""``recur label``: send labels to the labels topic, from a file or a single one.

A file of labels is sent unchanged. From a file of transactions with their truth, the command makes
labels with a delay of some days, as in the Fraud Detection Handbook.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from model.transaction import ID_MAX_CHARACTERS, TIMESTAMP_MAX_MS
from model.units import DAY_MS
from pipeline.errors import SettingsError
from pipeline.files.column_mapping import load_label_mapping, load_mapping
from pipeline.files.label_reader import LabelFile, LabelPart
from pipeline.files.parsing import LABEL_UNKNOWN
from pipeline.files.reader import TransactionFile
from pipeline.kafka.topics import ensure_topics
from pipeline.messages.labels import Label, encode_label
from pipeline.replay.feeding import feed_with_bar
from pipeline.replay.producer import Block, Feed
from pipeline.settings import Settings
from pipeline.timestamps import epoch_ms_of, labelled_time

SOURCE_FILE = "file"
SOURCE_HAND = "hand"
"""Source of labels that a person sends."""

DELAY_DAYS_MAX = 365.0
OFFSET_DAYS_MAX = 100_000
FRAUD: Literal["fraud"] = "fraud"
LEGITIMATE: Literal["legitimate"] = "legitimate"

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_SINGLE = ("transaction_id", "account_id", "merchant_id", "label", "timestamp")


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """Options of the command: a file, or the fields of a single label.

    Raises:
        SettingsError: an option is missing or out of bounds, or two exclude each other.
    """

    file: Path | None = None
    columns: Path | None = None
    """Column mapping for a file of labels."""
    from_transactions: str | None = None
    """Column mapping for a file of transactions with their truth."""
    delay_days: float = 7.0
    """Delay of labels that are made from transactions."""
    legitimate: bool = False
    """Make labels for legitimate transactions, too."""
    offset_days: float = 0.0
    """Days added to every time."""
    transaction_id: str | None = None
    account_id: str | None = None
    merchant_id: str | None = None
    label: str | None = None
    timestamp: str | None = None
    labelled_at: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in (*_SINGLE, "labelled_at") if getattr(self, name) is not None]
        if self.file is None:
            missing = [name for name in _SINGLE if getattr(self, name) is None]
            if missing:
                raise SettingsError(
                    "recur label needs FILE, or for a single label "
                    + ", ".join(_option(name) for name in _SINGLE)
                    + (f": {', '.join(map(_option, missing))} is missing" if given else "")
                )
        elif given:
            raise SettingsError(f"FILE and {_option(given[0])} exclude each other: keep one")
        if self.columns is not None and self.from_transactions is not None:
            raise SettingsError(
                "--columns is for a file of labels, --from-transactions for a file of transactions:"
                " keep one"
            )
        if not 0 <= self.delay_days <= DELAY_DAYS_MAX:
            raise SettingsError(
                f"--delay-days is {self.delay_days:g}; it must be from 0 to {DELAY_DAYS_MAX:g}"
            )
        if not abs(self.offset_days) <= OFFSET_DAYS_MAX:
            raise SettingsError(
                f"--offset-days is {self.offset_days:g}; it must be within {OFFSET_DAYS_MAX:,}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_label(options: LabelOptions, settings: Settings, console: Console | None = None) -> int:
    """Send labels.

    Returns:
        0.

    Raises:
        RecurError: the file, its column mapping or a row is wrong, or the broker is unreachable.
    """
    console = console or Console(highlight=False)
    if options.file is None:
        asyncio.run(_send_one(single_label(options), settings))
        console.print(f"sent 1 label to {settings.topic('labels')}")
        return 0
    labels = _LabelsOfFile(options, options.file)
    started = time.monotonic()
    sent = asyncio.run(_send_all(labels, settings, console))
    seconds = max(0.001, time.monotonic() - started)
    console.print(
        f"sent {sent:,} labels, {labels.frauds:,} of them fraud, to {settings.topic('labels')}"
        f" in {seconds:.1f} s"
    )
    return 0


def single_label(options: LabelOptions) -> Label:
    """Make the label that the options describe.

    Raises:
        SettingsError: an option is not an id or not a time; the message names it.
    """
    now_ms = time.time_ns() // 1_000_000
    timestamp_ms = epoch_ms_of(options.timestamp or "", "--timestamp")
    labelled_ms = now_ms
    if options.labelled_at is not None:
        labelled_ms = _labelled_ms(options.labelled_at, timestamp_ms)
    if labelled_ms < timestamp_ms:
        raise SettingsError(
            "--labelled-at is before the transaction's --timestamp: correct one of them"
        )
    for name in ("transaction_id", "account_id", "merchant_id"):
        if not 0 < len(getattr(options, name)) <= ID_MAX_CHARACTERS:
            raise SettingsError(f"{_option(name)} must have 1 to {ID_MAX_CHARACTERS} characters")
    return Label(
        transaction_id=options.transaction_id or "",
        account_id=options.account_id or "",
        merchant_id=options.merchant_id or "",
        label=FRAUD if options.label == FRAUD else LEGITIMATE,
        timestamp=timestamp_ms,
        labelled_at=labelled_ms,
        source=SOURCE_HAND,
    )


def _labelled_ms(text: str, timestamp_ms: int) -> int:
    """Read --labelled-at, which may be a date without a time, as epoch milliseconds."""
    is_date = _DATE.fullmatch(text) is not None
    labelled_ms = epoch_ms_of(f"{text}T00:00:00Z" if is_date else text, "--labelled-at")
    return labelled_time(timestamp_ms, labelled_ms) if is_date else labelled_ms


def encode_labels(
    transaction_ids: Iterable[str],
    account_ids: Iterable[str],
    merchant_ids: Sequence[str],
    is_fraud: NDArray[np.bool_],
    timestamps_ms: NDArray[np.int64],
    labelled_ms: NDArray[np.int64],
    source: str,
    merchant_weights: Sequence[float | None] | None = None,
) -> Block:
    """Encode n labels from columns of the same length as a block.

    Args:
        merchant_weights: n weights from 0 to 1; None: a label without a weight.
    """
    weights = merchant_weights or [None] * len(merchant_ids)
    values = [
        encode_label(
            Label(
                transaction,
                account,
                merchant,
                FRAUD if fraud else LEGITIMATE,
                time_ms,
                known,
                source,
                weight,
            )
        )
        for transaction, account, merchant, fraud, time_ms, known, weight in zip(
            transaction_ids,
            account_ids,
            merchant_ids,
            is_fraud.tolist(),
            timestamps_ms.tolist(),
            labelled_ms.tolist(),
            weights,
            strict=True,
        )
    ]
    return Block([merchant.encode() for merchant in merchant_ids], values)


class _LabelsOfFile:
    """Labels of a file, in blocks; ``frauds`` counts the labels of fraud among them."""

    def __init__(self, options: LabelOptions, path: Path) -> None:
        self.frauds = 0
        self._delay_ms = round(options.delay_days * DAY_MS)
        self._offset_ms = round(options.offset_days * DAY_MS)
        self._legitimate = options.legitimate
        self._labels: LabelFile | None = None
        self._transactions: TransactionFile | None = None
        if options.from_transactions is None:
            self._labels = LabelFile(path, load_label_mapping(options.columns))
            return
        mapping = load_mapping(options.from_transactions)
        if mapping.columns.label is None:
            raise SettingsError(
                f"the column mapping {options.from_transactions} has no label: name the column"
                " with the truth, from which labels are made"
            )
        self._transactions = TransactionFile(
            path, mapping, latest_ms=TIMESTAMP_MAX_MS, allow_unsorted=True
        )

    @property
    def fraction_read(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        file = self._labels or self._transactions
        return 1.0 if file is None else file.fraction_read

    def blocks(self) -> Iterator[Block]:
        """Encode the labels in file order."""
        for part in self._parts():
            self.frauds += int(part.is_fraud.sum())
            yield encode_labels(
                part.transaction_ids,
                part.account_ids,
                part.merchant_ids,
                part.is_fraud,
                part.timestamps_ms + self._offset_ms,
                part.labelled_ms + self._offset_ms,
                SOURCE_FILE,
                part.merchant_weights,
            )

    def _parts(self) -> Iterator[LabelPart]:
        if self._labels is not None:
            yield from self._labels.parts()
        elif self._transactions is not None:
            for part in self._transactions.parts():
                assert part.labels is not None
                chosen = part.labels == 1
                if self._legitimate:
                    chosen = part.labels != LABEL_UNKNOWN
                at = np.flatnonzero(chosen)
                if len(at):
                    yield LabelPart(
                        [part.transaction_ids[i] for i in at.tolist()],
                        [part.account_ids[i] for i in at.tolist()],
                        [part.merchant_ids[i] for i in at.tolist()],
                        part.labels[at] == 1,
                        part.timestamps_ms[at],
                        part.timestamps_ms[at] + self._delay_ms,
                    )


async def _send_one(label: Label, settings: Settings) -> None:
    await ensure_topics(settings)
    async with Feed(settings, "labels") as feed:
        await feed.send([label.merchant_id.encode()], [encode_label(label)])


async def _send_all(labels: _LabelsOfFile, settings: Settings, console: Console) -> int:
    """Send all labels and return the number of acknowledged ones."""
    await ensure_topics(settings)
    feed = Feed(settings, "labels")
    await feed_with_bar(
        feed, labels.blocks(), console, "sending labels", lambda acked: labels.fraction_read
    )
    return feed.count.acked
