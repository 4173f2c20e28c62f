"""First step of the processor: decode records into transactions and control records."""

from __future__ import annotations

import time
from collections.abc import Callable

from model.checkpoint import Checkpoint
from model.transaction import Transaction
from pipeline.errors import RejectedError
from pipeline.kafka.decompression_limit import refuse_batch
from pipeline.kafka.polls import Chunk, Record
from pipeline.messages.control import CONTROL_HEADER, decode_control
from pipeline.messages.decoding import payment_ms
from pipeline.messages.extra_fields import ExtraFields
from pipeline.messages.replies import gateway_of
from pipeline.messages.transactions import HISTORY_HEADER, WARM_HEADER, decode_transaction
from pipeline.scoring.stages import DecodedPart, ForgetRequest
from pipeline.settings import Settings
from pipeline.timestamps import RECORD_TIME_MAX_MS, event_time, is_record_time


class BatchDecoder:
    """Decoder of records, for the worker and for commands that compute its states again.

    Args:
        settings: limits.
        checkpoint: its currency and extra fields.
        clock_ms: wall clock, epoch milliseconds; used only for a record without a time.
    """

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.extra_fields = ExtraFields(checkpoint.header.features.fields)
        self._currency = checkpoint.header.currency
        self._max_ahead_ms = int(settings.max_timestamp_ahead_seconds * 1000)
        self._tolerance_ms = int(settings.timestamp_tolerance_seconds * 1000)
        self._max_age_ms = int(settings.max_timestamp_age_seconds * 1000)
        self._clock_ms = clock_ms

    def decode(self, partition: int, chunk: Chunk) -> DecodedPart:
        """Decode a chunk; invalid records go to ``rejected`` with their reason."""
        records: list[Record] = []
        transactions: list[Transaction] = []
        sent: list[int] = []
        timestamps: list[int] = []
        histories: list[bool] = []
        rows: list[int] = []
        accounts: list[str] = []
        forgets: list[ForgetRequest] = []
        rejected: list[tuple[Record, str, str]] = []
        gateways: dict[int, str] = {}
        row_of: dict[str, int] = {}
        for record in chunk.records:
            try:
                if record.headers and _is_control_record(record):
                    _apply_control(forgets, accounts, row_of, record)
                    continue
                is_history = False
                if record.headers:
                    is_history = _is_history(record)
                    gateway = gateway_of(record.headers)
                    if gateway is not None:
                        gateways[record.offset] = gateway
                transaction, sent_ms, timestamp_ms = self._transaction(record, is_history)
            except RejectedError as error:
                rejected.append((record, error.reason, str(error)))
                continue
            records.append(record)
            transactions.append(transaction)
            sent.append(sent_ms)
            timestamps.append(timestamp_ms)
            histories.append(is_history)
            row = row_of.setdefault(transaction.account_id, len(accounts))
            if row == len(accounts):
                accounts.append(transaction.account_id)
            rows.append(row)
        return DecodedPart(
            partition,
            chunk,
            records,
            transactions,
            sent,
            timestamps,
            histories,
            rows,
            accounts,
            forgets,
            rejected,
            gateways,
        )

    def _transaction(self, record: Record, is_history: bool) -> tuple[Transaction, int, int]:
        """Decode a transaction, its event time as sent, and its event time for the features."""
        refuse_batch(record.value)
        transaction = decode_transaction(
            record.key, record.value, self._currency, self.extra_fields
        )
        sent_ms = payment_ms(transaction.timestamp)
        record_ms = record.timestamp
        # Almost all records take this short way; the other one costs more calls.
        if -self._max_age_ms <= sent_ms - record_ms <= 0 and record_ms < RECORD_TIME_MAX_MS:
            return transaction, sent_ms, sent_ms
        return transaction, sent_ms, self._event_time(sent_ms, record_ms, is_history)

    def _event_time(self, sent_ms: int, record_ms: int, is_history: bool) -> int:
        """Return the event time for the features if it is early or old, or the record has no time.

        Raises:
            RejectedError: it is too early or too old.
        """
        has_time = is_record_time(record_ms)
        # Without a record time only the clock can reveal a time in the far future.
        ahead_ms = sent_ms - (record_ms if has_time else self._clock_ms())
        if ahead_ms > self._max_ahead_ms:
            of = "the record's own" if has_time else "the worker's clock"
            raise RejectedError(
                "future_timestamp",
                f"the timestamp is over {self._max_ahead_ms // 1000} s past {of}",
            )
        if not has_time:
            return sent_ms
        if -ahead_ms > self._max_age_ms and not is_history:
            raise RejectedError(
                "old_timestamp",
                f"the timestamp is over {self._max_age_ms // 1000} s before the record's own: send"
                f" history with the header {HISTORY_HEADER}, or set max_timestamp_age_seconds",
            )
        return event_time(sent_ms, record_ms, self._tolerance_ms)


def is_warm_up(record: Record) -> bool:
    """Return whether a record only warms up states and raises no alert."""
    return bool(record.headers) and any(name == WARM_HEADER for name, _ in record.headers)


def _is_control_record(record: Record) -> bool:
    """Return whether a record is a control record of a known or unknown kind."""
    return any(name == CONTROL_HEADER for name, _ in record.headers)


def _is_history(record: Record) -> bool:
    """Return whether a record is marked as history, so that it may be old."""
    return any(name in (HISTORY_HEADER, WARM_HEADER) for name, _ in record.headers)


def _apply_control(
    forgets: list[ForgetRequest], accounts: list[str], row_of: dict[str, int], record: Record
) -> None:
    """Enter a control record among the requests to forget an account.

    Raises:
        RejectedError: this version does not know the control record.
    """
    account_id = decode_control(record.key, record.value, record.headers)
    if account_id is not None:
        forgets.append(ForgetRequest(record.offset, len(accounts)))
        row_of[account_id] = len(accounts)
        accounts.append(account_id)
