"""Targets of the fuzzer: each decoder with its seeds, declared errors and checks.

A target takes bytes and returns a short outcome. It catches declared errors, so every error that it
raises is a finding. It also checks that an accepted input is usable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, cast

import msgspec
import numpy as np
import safetensors.torch
import torch

from model.architecture import Architecture
from model.checkpoint import Checkpoint, CheckpointError, Header
from model.features.merchant import MERCHANT_FEATURES, observe_merchants
from model.features.spec import ACCOUNT_INPUTS, FEATURES, FeatureSpec, Field, Input
from model.network import Network
from model.transaction import TIMESTAMP_MAX_MS, Transaction, epoch_ms
from pipeline.errors import RejectedError
from pipeline.messages.decoding import REASONS
from pipeline.messages.extra_fields import NO_EXTRA_FIELDS, ExtraFields
from pipeline.messages.labels import LABELS, decode_label
from pipeline.messages.scores import ScoreEncoder, decode_published, decode_score
from pipeline.messages.transactions import decode_transaction, encode_transaction, field_names
from pipeline.scoring.labels import merchant_label_of
from pipeline.scoring.scorer import MicroBatch, Scorer
from pipeline.storage.account_state import STATE_FORMAT
from pipeline.storage.keys import Keys
from pipeline.storage.merchant_profile import (
    EMPTY_VALUE,
    Fraud,
    Profile,
    decode_profiles,
    encode_frauds,
    transaction_hash,
)
from pipeline.storage.watermark import Watermark
from tests.fuzz.mutation import (
    Mutator,
    mutate_bytes,
    mutate_record,
    mutate_safetensors,
)

MIB = 1 << 20
DAY_MS = 86_400_000
NOW_MS = 1_700_000_000_000

MARK = "4111-1111-1111-1111"
"""Account number in the seeds, which no error message may contain."""


MESSAGE_MAX = 2000
"""Longest error message in characters, because it goes into a header or a log line."""


@dataclass(frozen=True)
class Target:
    """A decoder to fuzz.

    Attributes:
        run: decodes an input and returns its outcome.
        seeds: the first inputs.
        mutate: makes an input from another.
        memory_bytes: memory that one input may take.
    """

    name: str
    run: Callable[[bytes], str]
    seeds: tuple[bytes, ...]
    mutate: Mutator
    memory_bytes: int


def said(error: Exception) -> str:
    """Return an error's message without its numbers and quotes, as an outcome.

    Of several wrong tensors, safetensors names one at random.
    """
    text = str(error)
    assert MARK not in text, "the message quotes the input"
    assert text.isprintable(), "a message of several lines, or worse"
    assert len(text) <= MESSAGE_MAX, f"a message of {len(text)} characters"
    left_out = r"\d+|\"[^\"]*\"|'[^']*'|`\$[^`]*`|tensor `[^`]*`"
    return f"{type(error).__name__} " + re.sub(left_out, "#", text)[:120]


def rejected(error: RejectedError) -> str:
    """Return the outcome of a rejected record, and check its reason."""
    assert error.reason in REASONS, error.reason
    return said(error)


# transactions ----------------------------------------------------------------------------

_FURTHER = ExtraFields(
    [
        Field("category", "categorical", ("5411", "food")),
        Field("card age", "numeric"),
        Field("online", "categorical", ("true", "false")),
    ]
)
_KEYS = Keys("recur", "0" * 12, "transactions")
_ENCODER = ScoreEncoder(FEATURES, "0" * 12)
_NO_FEATURES = np.zeros((1, len(FEATURES)), np.float32)


def run_transaction(data: bytes) -> str:
    """Decode a record's value for a checkpoint without extra fields and for one with them."""
    outcomes = [_run_transaction(data, further) for further in (NO_EXTRA_FIELDS, _FURTHER)]
    field_names(data)
    return " / ".join(outcomes)


def _run_transaction(data: bytes, further: ExtraFields) -> str:
    try:
        transaction = decode_transaction(MARK.encode(), data, "EUR", further)
    except RejectedError as error:
        outcome = rejected(error)
        if error.reason != "key_mismatch":
            return outcome
        transaction = further.decode_json(data)  # check the rest as with the right key
    _use(transaction, further)
    return "accepted"


def _use(transaction: Transaction, further: ExtraFields) -> None:
    """Use a transaction like the worker does."""
    timestamp = epoch_ms(transaction.timestamp)
    assert timestamp <= TIMESTAMP_MAX_MS + DAY_MS
    assert 0 <= transaction.amount < math.inf
    assert transaction_hash(transaction.transaction_id) >= 0
    (name,) = _KEYS.accounts(0, [transaction.account_id])
    assert len(name) < 2048
    assert not np.isinf(further.columns([transaction])).any()
    assert further.decode_json(encode_transaction(transaction)) == transaction
    (numbers,) = _ENCODER.numbers(np.zeros(1, np.float32), _NO_FEATURES)
    value = _ENCODER.encode(transaction, timestamp, "t:0:1", numbers, "approve")
    assert decode_score(value).account_id == transaction.account_id
    assert decode_published(value) is not None


_TRANSACTION: dict[str, Any] = {
    "transaction_id": "T000123",
    "account_id": MARK,
    "merchant_id": "M0004321",
    "amount": 42.5,
    "currency": "EUR",
    "timestamp": "2018-08-15T10:00:00Z",
}


def _record(**changes: Any) -> bytes:
    return json.dumps(_TRANSACTION | changes).encode()


TRANSACTIONS = (
    _record(),
    _record(timestamp=1_534_327_200_000, amount=0, category="5411", channel="online", country="DE"),
    _record(timestamp=1_534_327_200),
    _record(account_id="é🙂", category=5411, online=True, **{"card age": 3.5}, more={"a": [1, {}]}),
)

# labels ----------------------------------------------------------------------------------

LABEL = json.dumps(
    {
        "transaction_id": "T000123",
        "account_id": MARK,
        "merchant_id": "M0004321",
        "label": "fraud",
        "timestamp": "2018-08-15T10:00:00Z",
        "labelled_at": "2018-08-22T10:00:00+02:00",
        "source": "chargeback",
    }
).encode()


DATED_LABEL = LABEL.replace(b"T10:00:00Z", b"").replace(b"T10:00:00+02:00", b"")


def run_label(data: bytes) -> str:
    """Decode a label; encode an accepted one like the merchant store."""
    key = b"M0004321"
    try:
        label, timestamp_ms, labelled_ms = decode_label(key, data)
    except RejectedError as error:
        return rejected(error)
    assert 0 <= timestamp_ms <= labelled_ms <= TIMESTAMP_MAX_MS + DAY_MS
    assert label.label in LABELS
    booking = merchant_label_of(0, label, timestamp_ms, labelled_ms)
    assert len(encode_frauds([booking.entry])[0]) == 16
    return f"accepted {label.label}"


# account states --------------------------------------------------------------------------


def small_checkpoint() -> Checkpoint:
    """Make an untrained checkpoint without merchants."""
    roles = FeatureSpec(ACCOUNT_INPUTS).roles
    architecture = Architecture(
        len(ACCOUNT_INPUTS), 4, 8, head_size=4, dropout=0.0, rising_size=4, roles=roles
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = Network(architecture)
    return Checkpoint.of(
        network, Header(architecture=architecture, features=FeatureSpec(ACCOUNT_INPUTS))
    )


_SCORER = Scorer(small_checkpoint(), ttl_ms=30 * DAY_MS)
_CODEC = _SCORER.codec


def _batch(rows: list[int], first_offset: int) -> MicroBatch:
    """Make a micro-batch with one transaction for each row."""
    n = len(rows)
    place = np.arange(n)
    return MicroBatch(
        row=np.array(rows, np.intp),
        amount=np.full(n, 20.0),
        timestamp_ms=NOW_MS + 60_000 * (first_offset + place),
        record_ms=NOW_MS + 60_000 * (first_offset + place),
        offset=first_offset + place.astype(np.int64),
        id_hash=np.arange(1 + first_offset, 1 + first_offset + n, dtype=np.uint64),
        merchant_raw=np.zeros((n, len(MERCHANT_FEATURES)), np.float32),
        fields=np.zeros((n, 0), np.float32),
        explain_from=np.full(n, 2.0, np.float32),
    )


def _state() -> bytes:
    states, _, _, _ = _SCORER.score([None], _batch([0] * 10, 0))
    return _CODEC.encode(states, np.arange(1))[0]


STATE = _state()


def sealed(value: bytes) -> bytes:
    """Return a state's bytes with the right checksum."""
    if len(value) != _CODEC.size_bytes:
        return value
    table = np.frombuffer(value, _CODEC.dtype).copy()
    return _CODEC._sealed(table).tobytes()


def mutate_state(data: bytes, random: Random) -> bytes:
    """Mutate a state's bytes, and correct the checksum in half of the cases."""
    changed = mutate_bytes(data, random)
    if random.random() < 0.5:
        size = _CODEC.size_bytes
        return sealed(changed[:size].ljust(size, b"\0"))
    return changed


def run_state(data: bytes) -> str:
    """Decode a state beside a valid and an absent one; if it is accepted, score all three."""
    states, loaded, refused = _CODEC.decode([STATE, data, None])
    assert loaded[0]
    assert not loaded[2]
    assert refused == 1 - int(loaded[1])
    assert _CODEC.encode(states, np.array([0])) == [STATE], "a neighbour changed"
    if loaded[1]:
        assert len(data) == _CODEC.size_bytes
        assert data[0] == STATE_FORMAT
        assert sealed(data) == data
    else:
        absent = _CODEC.encode(states, np.array([1, 2]))
        assert absent[0] == absent[1], "it is not as if there were none"
        return "refused"
    batch = _batch([0, 1, 2, 1], 100)
    _, scored, used, _ = _SCORER.score([STATE, data, None], batch)
    assert used[0]
    assert np.isfinite(scored.score).all()
    assert not scored.failed, "a state makes its account's transactions fail"
    return f"accepted, {'used' if used[1] else 'not used'}"


WATERMARK = Watermark(8, 51_234, 51_300, 2**63 + 5).to_bytes()


def run_watermark(data: bytes) -> str:
    """Decode a watermark; check that an accepted one encodes and decodes unchanged."""
    try:
        mark = Watermark.from_bytes(data)
    except ValueError as error:
        return said(error)
    assert mark.next_offset >= 0
    assert mark.scores_offset >= 0
    assert mark.partitions >= 1
    assert Watermark.from_bytes(mark.to_bytes()) == mark
    return "accepted"


# merchants' profiles ---------------------------------------------------------------------


def _profile() -> Profile:
    profile = Profile()
    present = NOW_MS // (6 * 3_600_000)
    for bucket in range(present - 120, present):
        profile.count(bucket, bucket % 5)
    for i in range(3):
        profile.record(Fraud(i + 1, present - 40 + i, present - 10), is_fraud=True)
    return profile


PROFILE = _profile().to_bytes()


def run_profile(data: bytes) -> str:
    """Decode a profile beside a valid and an absent one, and compute the features of all three."""
    profiles, refused = decode_profiles([PROFILE, data, None])
    assert len(profiles) == 3
    try:
        alone = Profile.from_bytes(data)
    except ValueError as error:
        assert refused == 1
        outcome = said(error)
    else:
        assert refused == 0
        again = Profile.from_bytes(alone.to_bytes())
        assert (again.head, again.frauds) == (alone.head, alone.frauds)
        outcome = f"accepted, {min(len(alone.frauds), 4)} frauds"
    rows = np.array([0, 1, 2, 1], np.intp)
    raw = observe_merchants(profiles, rows, NOW_MS + np.arange(4) * DAY_MS, 7 * DAY_MS)
    assert raw.shape == (4, len(MERCHANT_FEATURES))
    assert np.isfinite(raw).all()
    expected = observe_merchants(
        decode_profiles([PROFILE])[0], rows[:1], np.array([NOW_MS]), 7 * DAY_MS
    )
    assert np.array_equal(raw[:1], expected), "a neighbour changed"
    return outcome


# checkpoints -----------------------------------------------------------------------------


class InMemoryFile:
    """The part of a path that the checkpoint reader uses."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def open(self, mode: str) -> BytesIO:
        """Open the content for reading."""
        assert mode == "rb"
        return BytesIO(self._content)

    def __str__(self) -> str:
        return "model.safetensors"


def _checkpoint_bytes(fields: tuple[Field, ...] = ()) -> bytes:
    inputs = (
        Input("amount", "log1p", mean=3.0),
        Input("hour_of_day", "sin", period=24.0),
        *(Input(field.name, "category") for field in fields),
    )
    embeddings = tuple((1 + len(field.vocabulary), 2) for field in fields)
    features = FeatureSpec(inputs, fields=fields)
    architecture = Architecture(
        2, 2, 2, head_size=2, embeddings=embeddings, rising_size=2, roles=features.roles
    )
    header = Header(
        architecture=architecture,
        features=features,
        metrics={"average_precision": 0.3},
        training={"seed": 1, "note": {"a": [1, 2]}},
        operating_points=[[0.5, 0.1]],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = Network(architecture)
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    text = msgspec.json.encode(header, order="deterministic").decode()
    return safetensors.torch.save(weights, {"recur": text})


def run_checkpoint(data: bytes) -> str:
    """Load a checkpoint file; run a step of an accepted one."""
    try:
        checkpoint = Checkpoint.load(cast(Path, InMemoryFile(data)))
    except CheckpointError as error:
        return said(error)
    assert re.fullmatch("[0-9a-f]{12}", checkpoint.digest)
    raw = np.ones((2, len(checkpoint.header.features.names)), np.float32)
    raw[:, len(FEATURES) :] = 0.0  # unknown categories, which every vocabulary has
    stepper = checkpoint.stepper
    with np.errstate(all="ignore"):
        logits, hidden = stepper.step(checkpoint.encode(raw), stepper.empty_hidden(2))
    assert logits.shape == (2,)
    assert hidden.shape[0] == 2
    return "accepted"


def _targets() -> dict[str, Target]:
    long_profile = PROFILE + PROFILE[-16:] * 50
    checkpoints = (
        _checkpoint_bytes(),
        _checkpoint_bytes((Field("category", "categorical", ("food", "fuel")),)),
    )
    targets = (
        Target("transaction", run_transaction, TRANSACTIONS, mutate_record, 32 * MIB),
        Target("label", run_label, (LABEL, DATED_LABEL), mutate_record, 32 * MIB),
        Target("state", run_state, (STATE, sealed(bytes(len(STATE)))), mutate_state, 32 * MIB),
        Target("watermark", run_watermark, (WATERMARK,), mutate_bytes, 32 * MIB),
        Target(
            "profile", run_profile, (PROFILE, EMPTY_VALUE, long_profile), mutate_bytes, 32 * MIB
        ),
        Target("checkpoint", run_checkpoint, checkpoints, mutate_safetensors, 128 * MIB),
    )
    return {target.name: target for target in targets}


TARGETS = _targets()
