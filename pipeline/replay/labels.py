"""``recur label``: labels to the labels topic, from a file or a single one.

A file of labels is sent as it stands. Of a file of transactions with their truth, labels are
made that come so many days late, as in the Fraud Detection Handbook.
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
from pipeline.errors import SettingsError
from pipeline.files.column_mapping import load_label_mapping, load_mapping
from pipeline.files.reader import LABEL_UNKNOWN, LabelFile, LabelPart, TransactionFile
from pipeline.kafka.topics import ensure_topics
from pipeline.messages.labels import Label, encode_label
from pipeline.progress import bar_for
from pipeline.replay.producer import Block, Feed, ahead
from pipeline.settings import Settings
from pipeline.timestamps import epoch_ms_of, labelled_time
from pipeline.units import DAY_MS

SOURCE_FILE = "file"
SOURCE_HAND = "hand"
"""Who said so, of labels that a person sends."""

FRAME_SECONDS = 0.2
DELAY_DAYS_MAX = 365.0
OFFSET_DAYS_MAX = 100_000
FRAUD: Literal["fraud"] = "fraud"
LEGITIMATE: Literal["legitimate"] = "legitimate"

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_SINGLE = ("transaction_id", "account_id", "merchant_id", "label", "timestamp")


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """What the person asked for: a file, or the fields of a single label.

    Raises:
        SettingsError: options that are missing, exclude each other or are out of their bounds.
    """

    file: Path | None = None
    columns: Path | None = None
    """A column mapping for a file of labels."""
    from_transactions: str | None = None
    """The file holds transactions with their truth; their column mapping."""
    delay_days: float = 7.0
    """Labels made of transactions come so long after them."""
    legitimate: bool = False
    """Make labels of legitimate transactions, too."""
    offset_days: float = 0.0
    """Added to every time."""
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
                "--columns is for a file of labels, --from-transactions for one of transactions:"
                " keep one"
            )
        if not 0 <= self.delay_days <= DELAY_DAYS_MAX:
            raise SettingsError(
                f"--delay-days is {self.delay_days:g}; it must be 0 to {DELAY_DAYS_MAX:g}"
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
        RecurError: the file, its column mapping or a row is wrong, or the broker is away.
    """
    console = console or Console(highlight=False)
    if options.file is None:
        asyncio.run(_send_one(single_label(options), settings))
        console.print(f"sent 1 label to {settings.topic('labels')}")
        return 0
    labels = _FileLabels(options, options.file)
    started = time.monotonic()
    sent = asyncio.run(_send_all(labels, settings, console))
    seconds = max(0.001, time.monotonic() - started)
    console.print(
        f"sent {sent:,} labels, {labels.frauds:,} of them fraud, to {settings.topic('labels')}"
        f" in {seconds:.1f} s"
    )
    return 0


def single_label(options: LabelOptions) -> Label:
    """The label that the options spell out.

    Raises:
        SettingsError: one of them is no id or no time, naming it.
    """
    now_ms = time.time_ns() // 1_000_000
    timestamp_ms = epoch_ms_of(options.timestamp or "", "--timestamp")
    labelled_ms = now_ms
    if options.labelled_at is not None:
        labelled_ms = _labelled_ms(options.labelled_at, timestamp_ms)
    if labelled_ms < timestamp_ms:
        raise SettingsError("the label would be known before the transaction's --timestamp")
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
    """Epoch milliseconds of --labelled-at, which may be a date without a time."""
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
    """A block of n labels to send, from equally long columns.

    Args:
        merchant_weights: n, from 0 to 1; None where a label tells none.
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


class _FileLabels:
    """Labels of a file, in blocks; ``frauds`` counts those handed out that say fraud."""

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
                f"the column mapping {options.from_transactions} names no label: without the truth"
                " no labels can be made"
            )
        self._transactions = TransactionFile(
            path, mapping, latest_ms=TIMESTAMP_MAX_MS, allow_unsorted=True
        )

    @property
    def fraction_read(self) -> float:
        """How much of the file has been read, 0 to 1."""
        file = self._labels or self._transactions
        return 1.0 if file is None else file.fraction_read

    def blocks(self) -> Iterator[Block]:
        """Encoded, in file order."""
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


async def _send_all(labels: _FileLabels, settings: Settings, console: Console) -> int:
    """How many the broker has."""
    await ensure_topics(settings)
    with bar_for(console) as bar:
        async with Feed(settings, "labels") as feed:
            feeding = asyncio.ensure_future(feed.run(ahead(labels.blocks())))
            try:
                while not feeding.done():
                    await asyncio.wait([feeding], timeout=FRAME_SECONDS)
                    bar.show("sending labels", feed.count.acked, labels.fraction_read)
            finally:
                feeding.cancel()
            feeding.result()
        return feed.count.acked
