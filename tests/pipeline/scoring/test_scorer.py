"""The scorer: cuts of micro-batches, duplicates, expiry, and failing transactions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.features.merchant import MERCHANT_FEATURES
from model.stepper import sigmoid
from pipeline.scoring.scorer import (
    FAILURES_IN_A_ROW_MAX,
    BatchScores,
    MicroBatch,
    Scorer,
    ScorerBrokenError,
)
from pipeline.storage.account_state import RECENT_IDS
from tests.fakes.memory_workers import DAY_MS, HIDDEN_TOLERANCE, SCORE_TOLERANCE, small_checkpoint

POISON = 666.0
"""Amount of a transaction that makes the computation fail in some tests."""

ACCOUNTS = 5
CHECKPOINT = small_checkpoint()


def batch_of(
    rows: Sequence[int],
    amounts: Sequence[float] | None = None,
    *,
    ids: Sequence[int] | None = None,
    record_ms: Sequence[int] | None = None,
    explain_from: Sequence[float] | None = None,
    start: int = 0,
) -> MicroBatch:
    """Make transactions a minute apart, with distinct ids unless given, and offsets from start."""
    n = len(rows)
    times = np.arange(n, dtype=np.int64) * 60_000 + 1_700_000_000_000
    return MicroBatch(
        row=np.array(rows, np.intp),
        amount=np.array([20.0] * n if amounts is None else amounts, np.float64),
        timestamp_ms=times,
        record_ms=times if record_ms is None else np.array(record_ms, np.int64),
        offset=np.arange(start, start + n, dtype=np.int64),
        id_hash=np.array(range(1, n + 1) if ids is None else ids, np.uint64),
        merchant_raw=np.zeros((n, len(MERCHANT_FEATURES)), np.float32),
        fields=np.zeros((n, 0), np.float32),
        explain_from=np.array([2.0] * n if explain_from is None else explain_from, np.float32),
    )


def score(
    scorer: Scorer, values: Sequence[bytes | None], batch: MicroBatch
) -> tuple[list[bytes], BatchScores]:
    """Return the states afterwards, as bytes, and the scores."""
    states, scored, _, _ = scorer.score(values, batch)
    return scorer.codec.encode(states, np.arange(len(values))), scored


def assert_close(scorer: Scorer, found: Sequence[bytes], expected: Sequence[bytes]) -> None:
    """Check that states are equal, except for float16's rounding of the hidden state."""
    a, b = scorer.codec.decode(found)[0], scorer.codec.decode(expected)[0]
    assert np.abs(a.hidden.astype(np.float32) - b.hidden).max(initial=0) < HIDDEN_TOLERANCE
    a.hidden[:] = b.hidden
    everything = np.arange(len(found))
    assert scorer.codec.encode(a, everything) == scorer.codec.encode(b, everything)


rows_and_amounts = st.lists(
    st.tuples(st.integers(0, ACCOUNTS - 1), st.floats(0, 5000), st.integers(1, 12)),
    min_size=1,
    max_size=40,
)


@given(rows_and_amounts, st.data())
@settings(max_examples=60)
def test_the_cut_of_a_micro_batch_leaves_no_trace(
    drawn: list[tuple[int, float, int]], data: st.DataObject
) -> None:
    rows, amounts, ids = zip(*drawn, strict=True)
    batch = batch_of(rows, amounts, ids=ids)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)), max_size=6)) | {0, len(rows)})
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    whole, expected = score(scorer, [None] * ACCOUNTS, batch)

    values: Sequence[bytes | None] = [None] * ACCOUNTS
    parts = []
    for start, stop in pairwise(cuts):
        values, scored = score(scorer, values, batch.take(slice(start, stop)))
        parts.append(scored)

    assert_close(scorer, [value or b"" for value in values], whole)
    repeated = np.concatenate([part.duplicate for part in parts])
    assert repeated.tolist() == expected.duplicate.tolist()
    scores = np.concatenate([part.score for part in parts])
    np.testing.assert_allclose(scores, expected.score, atol=SCORE_TOLERANCE)
    raw = np.concatenate([part.raw for part in parts])
    np.testing.assert_array_equal(raw, expected.raw)


@given(st.lists(st.floats(0, 5000), min_size=1, max_size=20), st.data())
@settings(max_examples=40)
def test_cuts_that_keep_the_rounds_change_no_bit(amounts: list[float], data: st.DataObject) -> None:
    """Every round of a single account has one row, wherever the micro-batch is cut."""
    batch = batch_of([0] * len(amounts), amounts)
    cut = data.draw(st.integers(0, len(amounts)))
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    whole, expected = score(scorer, [None], batch)

    first, before = score(scorer, [None], batch.take(slice(0, cut)))
    second, after = score(scorer, first, batch.take(slice(cut, len(amounts))))

    assert second == whole
    assert np.concatenate((before.score, after.score)).tobytes() == expected.score.tobytes()


def test_the_order_of_accounts_in_the_states_does_not_matter() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    straight, _ = score(scorer, [None] * 3, batch_of([0, 1, 2, 0]))
    turned, _ = score(scorer, [None] * 3, batch_of([2, 1, 0, 2]))

    assert_close(scorer, turned[::-1], straight)


def test_a_score_is_the_networks_output_for_the_hidden_state() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    values, _ = score(scorer, [None], batch_of([0]))
    hidden = scorer.codec.decode(values)[0].hidden

    _, scored = score(scorer, values, batch_of([0], [50.0], ids=[9], start=1))

    logits, _ = CHECKPOINT.stepper.step(CHECKPOINT.encode(scored.raw), hidden)
    assert scored.score[0] == sigmoid(logits)[0]


# duplicates ------------------------------------------------------------------------------


def test_a_duplicate_is_dropped_also_inside_one_micro_batch() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    once, _ = score(scorer, [None], batch_of([0, 0], ids=[7, 8]))

    states, scored = score(scorer, [None], batch_of([0, 0, 0, 0], ids=[7, 8, 7, 8]))
    assert scored.duplicate.tolist() == [False, False, True, True]
    assert states == once

    states, scored = score(scorer, once, batch_of([0, 0], ids=[8, 7], start=2))
    assert scored.duplicate.tolist() == [True, True]
    assert states == once


def test_the_same_id_of_another_account_is_no_duplicate() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)

    _, scored = score(scorer, [None] * 2, batch_of([0, 1], ids=[7, 7]))

    assert not scored.duplicate.any()


def test_the_last_ids_are_remembered_and_older_ones_forgotten() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    ids = list(range(1, RECENT_IDS + 2))
    states, _ = score(scorer, [None], batch_of([0] * len(ids), ids=ids))

    for number in ids[1:]:
        _, scored = score(scorer, states, batch_of([0], ids=[number], start=99))
        assert scored.duplicate.all(), f"id {number} is one of the last {RECENT_IDS}"
    _, scored = score(scorer, states, batch_of([0], ids=[1], start=99))
    assert not scored.duplicate.any()


# expiry ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("silent_ms", "expired"), [(DAY_MS, 0), (DAY_MS + 1, 1)])
def test_an_account_silent_for_longer_than_its_time_to_live_is_reset_by_record_time(
    silent_ms: int, expired: int
) -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=DAY_MS)
    first = batch_of([0], record_ms=[0])
    second = batch_of([0], ids=[2], record_ms=[silent_ms], start=1)
    anew, fresh = score(scorer, [None], second)

    states, _ = score(scorer, [None], first)
    after, scored = score(scorer, states, second)

    assert scored.expired == expired
    assert (after == anew) == bool(expired)
    assert (scored.score.tobytes() == fresh.score.tobytes()) == bool(expired)


def test_expiry_inside_a_micro_batch_works_as_between_two() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=DAY_MS)
    batch = batch_of([0, 0, 0], record_ms=[0, 2 * DAY_MS, 2 * DAY_MS + 1])

    together, scored = score(scorer, [None], batch)

    states: Sequence[bytes | None] = [None]
    for i in range(3):
        states, _ = score(scorer, states, batch.take(slice(i, i + 1)))
    assert scored.expired == 1
    assert together == states
    assert scorer.codec.decode(together)[0].first_offset.tolist() == [1]


def test_a_record_time_that_runs_backwards_expires_nothing() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=DAY_MS)
    times = [10 * DAY_MS, 0, 10 * DAY_MS + 5]

    states, scored = score(scorer, [None], batch_of([0, 0, 0], record_ms=times))

    assert scored.expired == 0
    assert scorer.codec.decode(states)[0].last_record_ms.tolist() == [10 * DAY_MS + 5]


def test_loaded_missing_and_invalid_states_are_counted_separately() -> None:
    scorer = Scorer(CHECKPOINT, ttl_ms=DAY_MS)
    (value,), _ = score(scorer, [None], batch_of([0]))

    _, _, loaded, refused = scorer.score([value, None, b"junk"], batch_of([0, 1, 2], start=1))

    assert loaded.tolist() == [True, False, False]
    assert refused == 1


# states of a watermark that was set back -------------------------------------------------


@pytest.mark.parametrize("poison", [False, True])
def test_a_state_past_its_transactions_counts_as_absent(poison: bool) -> None:
    """A rebuild sets the watermark back, so these transactions are computed again.

    This also holds if the micro-batch is bisected and the states are decoded again.
    """
    scorer = Scorer(Brittle(raise_error) if poison else CHECKPOINT, ttl_ms=30 * DAY_MS)
    batch = batch_of([0, 1, 0], [20.0, 300.0, 40.0], start=5)
    expected, _ = score(scorer, [None] * 3, batch)
    (before,), _ = score(scorer, [None], batch_of([0], ids=[77], start=4))
    (other,), _ = score(scorer, [before], batch_of([0], ids=[78], start=5))
    if poison:
        batch = batch_of([0, 1, 0, 2], [20.0, 300.0, 40.0, POISON], start=5)

    states, scored, loaded, refused = scorer.score([other, expected[1], None], batch)

    assert scorer.codec.encode(states, np.arange(3)) == expected
    assert (loaded.tolist(), refused) == ([False] * 3, 0)
    assert not scored.duplicate.any()
    states, _, loaded, _ = scorer.score([before, None, None], batch)
    assert loaded.tolist() == [True, False, False], "one before them is theirs"
    assert states.first_offset[0] == 4


# failures --------------------------------------------------------------------------------


class Brittle(Checkpoint):
    """A checkpoint whose computation fails for :data:`POISON`."""

    def __init__(self, how: Callable[[np.ndarray[Any, Any]], None]) -> None:
        super().__init__(CHECKPOINT.weights, CHECKPOINT.header)
        self._how = how

    def encode(self, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Encode the inputs, unless a transaction among them is poison."""
        inputs = super().encode(raw)
        self._how(inputs[raw[:, 0] == POISON])
        return inputs


def raise_error(poisoned: np.ndarray[Any, Any]) -> None:
    if len(poisoned):
        raise FloatingPointError("it fails")


class NotANumber(Brittle):
    """A checkpoint whose network gives NaN for poison."""

    def __init__(self) -> None:
        super().__init__(lambda poisoned: None)

    def encode(self, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        inputs = super().encode(raw)
        inputs[raw[:, 0] == POISON] = np.nan
        return inputs


BRITTLE = pytest.mark.parametrize(
    "brittle", [Brittle(raise_error), NotANumber()], ids=["raises", "gives NaN"]
)


@BRITTLE
@given(
    st.lists(
        st.tuples(st.integers(0, ACCOUNTS - 1), st.sampled_from([1.0, 20.0, 300.0, POISON])),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=50)
def test_only_failing_transactions_are_left_out(
    brittle: Brittle, drawn: list[tuple[int, float]]
) -> None:
    rows, amounts = zip(*drawn, strict=True)
    batch = batch_of(rows, amounts)
    culprits = [i for i, amount in enumerate(amounts) if amount == POISON]
    good = np.setdiff1d(np.arange(len(rows)), culprits)
    scorer = Scorer(brittle, ttl_ms=DAY_MS)
    without, expected = score(scorer, [None] * ACCOUNTS, take(batch, good))

    states, scored = score(scorer, [None] * ACCOUNTS, batch)

    assert sorted(scored.failed) == culprits
    assert_close(scorer, states, without)
    np.testing.assert_allclose(scored.score[good], expected.score, atol=SCORE_TOLERANCE)
    np.testing.assert_array_equal(scored.raw[good], expected.raw)
    assert not scored.score[culprits].any()
    assert not scored.duplicate.any()


def take(batch: MicroBatch, rows: np.ndarray[Any, Any]) -> MicroBatch:
    return MicroBatch(*(column[rows] for column in msgspec.structs.astuple(batch)))


@BRITTLE
def test_a_failing_transaction_does_not_change_its_neighbours(
    brittle: Brittle,
) -> None:
    scorer = Scorer(brittle, ttl_ms=DAY_MS)
    batch = batch_of([0, 0, 0], [20.0, POISON, 30.0])
    without, expected = score(scorer, [None], take(batch, np.array([0, 2])))

    states, scored = score(scorer, [None], batch)

    assert list(scored.failed) == [1]
    assert states == without
    assert scored.score[[0, 2]].tobytes() == expected.score.tobytes()


def test_the_error_of_a_failing_transaction_is_reported_and_bounded() -> None:
    def tell(poisoned: np.ndarray[Any, Any]) -> None:
        if len(poisoned):
            raise ValueError("x" * 10_000)

    _, scored = score(Scorer(Brittle(tell), ttl_ms=DAY_MS), [None], batch_of([0], [POISON]))

    assert scored.failed[0].startswith("ValueError: xxx")
    assert len(scored.failed[0]) <= 200


def test_an_expiry_before_a_failure_is_undone_with_it() -> None:
    scorer = Scorer(Brittle(raise_error), ttl_ms=DAY_MS)
    states, _ = score(scorer, [None], batch_of([0], record_ms=[0]))

    late = batch_of([0], [POISON], ids=[2], record_ms=[9 * DAY_MS], start=1)
    after, scored = score(scorer, states, late)

    assert after == states
    assert (scored.expired, list(scored.failed)) == (0, [0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the cause of the failure
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("hidden", np.nan),
        ("hidden", np.inf),
        ("decayed_amount", np.nan),
        ("decayed_count", np.nan),
        ("usual_amount", np.inf),
        ("last_event_ms", -(2**63)),
    ],
)
def test_a_state_whose_numbers_make_the_computation_fail_is_invalid(
    name: str, number: float
) -> None:
    """Otherwise all transactions of its account fail, and many failures in a row end the worker."""
    scorer = Scorer(CHECKPOINT, ttl_ms=30 * DAY_MS)
    values, _ = score(scorer, [None] * 2, batch_of([0, 1]))
    table = np.frombuffer(values[1], scorer.codec.dtype).copy()
    table[name] = number
    poisoned = scorer.codec._sealed(table).tobytes()
    assert scorer.codec.decode([poisoned])[1].all(), "the checksum is right"
    rows = [0, *[1] * (FAILURES_IN_A_ROW_MAX + 1)]
    batch = batch_of(rows, ids=range(10, 10 + len(rows)), start=2)

    states, scored, loaded, refused = scorer.score([values[0], poisoned], batch)

    assert (loaded.tolist(), refused) == ([True, False], 1)
    assert not scored.failed
    expected, _ = score(scorer, [values[0], None], batch)
    assert_close(scorer, scorer.codec.encode(states, np.arange(2)), expected)


def test_a_failure_that_passes_on_retry_leaves_nothing_out() -> None:
    failures = iter([True])

    def once(poisoned: np.ndarray[Any, Any]) -> None:
        if next(failures, False):
            raise MemoryError

    scorer = Scorer(Brittle(once), ttl_ms=DAY_MS)

    states, scored = score(scorer, [None] * 2, batch_of([0, 1, 0]))

    assert not scored.failed
    assert states == score(Scorer(CHECKPOINT, ttl_ms=DAY_MS), [None] * 2, batch_of([0, 1, 0]))[0]


def test_a_scorer_that_always_fails_raises_instead_of_rejecting_everything() -> None:
    scorer = Scorer(Brittle(raise_error), ttl_ms=DAY_MS)
    n = FAILURES_IN_A_ROW_MAX + 1

    with pytest.raises(ScorerBrokenError, match="FloatingPointError"):
        score(scorer, [None], batch_of([0] * n, [POISON] * n))


def test_failures_add_up_over_micro_batches_until_one_succeeds() -> None:
    scorer = Scorer(Brittle(raise_error), ttl_ms=DAY_MS)
    for _ in range(FAILURES_IN_A_ROW_MAX):
        score(scorer, [None], batch_of([0], [POISON]))
    score(scorer, [None], batch_of([0], [20.0]))
    for _ in range(FAILURES_IN_A_ROW_MAX):
        score(scorer, [None], batch_of([0], [POISON]))

    with pytest.raises(ScorerBrokenError):
        score(scorer, [None], batch_of([0], [POISON]))


def test_stacked_layers_are_advanced_together() -> None:
    scorer = Scorer(small_checkpoint(layers=3), ttl_ms=DAY_MS)
    together, _ = score(scorer, [None] * 2, batch_of([0, 1, 0]))

    first, _ = score(scorer, [None] * 2, batch_of([0, 1]))
    alone = batch_of([0, 1, 0]).take(slice(2, 3))
    second, _ = score(scorer, first, alone)

    assert_close(scorer, second, together)
    hidden = scorer.codec.decode(together)[0].hidden
    assert hidden.shape == (2, 3, 8)
    assert all(hidden[0, layer].any() for layer in range(3))


def test_an_empty_micro_batch_is_no_error() -> None:
    states, scored = score(Scorer(CHECKPOINT, ttl_ms=DAY_MS), [], batch_of([]))

    assert states == []
    assert len(scored.score) == 0


def test_the_network_does_not_learn_nor_drop_out_in_the_worker() -> None:
    scorer = Scorer(small_checkpoint(), ttl_ms=DAY_MS)
    first = score(scorer, [None], batch_of([0]))[1].score
    second = score(scorer, [None], batch_of([0]))[1].score

    assert first.tobytes() == second.tobytes()


def test_a_worker_scores_without_torch() -> None:
    """Torch takes seconds to import and most of a worker's memory."""
    code = """
import sys
from pipeline.checkpoint import load_checkpoint
from pipeline.settings import load_settings
from pipeline.worker.process import run_worker
from pipeline.scoring.scorer import scorer_of
scorer_of(load_settings(), load_checkpoint(load_settings()))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_hidden_state_before_is_kept_only_for_scores_above_the_threshold() -> None:
    scorer = Scorer(CHECKPOINT, 30 * DAY_MS)
    rows, amounts = [0, 1, 0, 0, 1, 2], [20.0, 300.0, 5.0, 250.0, 1.0, 90.0]
    _, plain = score(scorer, [None] * ACCOUNTS, batch_of(rows, amounts))
    assert plain.before == {}
    middle = float(np.sort(plain.score)[3])

    found = [middle] * 5 + [0.0]
    _, scored = score(scorer, [None] * ACCOUNTS, batch_of(rows, amounts, explain_from=found))

    wanted = {i for i in range(6) if plain.score[i] >= found[i]}
    assert scored.before.keys() == wanted
    states: list[bytes | None] = [None] * ACCOUNTS
    for i in range(6):  # one at a time, to observe the state before each
        if i in wanted:
            hidden = scorer.codec.decode(states)[0].hidden[rows[i]]
            difference = np.abs(scored.before[i].astype("f4") - hidden.astype("f4")).max()
            assert difference <= HIDDEN_TOLERANCE
        after, _ = score(scorer, states, batch_of(rows, amounts).take(slice(i, i + 1)))
        states = list(after)


def test_the_hidden_state_before_survives_a_bisection() -> None:
    class Poisoned(Scorer):
        def _step(self, states: Any, batch: MicroBatch, *rest: Any) -> Any:
            if POISON in batch.amount:
                raise ValueError("poison")
            return super()._step(states, batch, *rest)

    rows, amounts = [0, 1, 0, 1], [20.0, 300.0, POISON, 250.0]
    batch = batch_of(rows, amounts, explain_from=[0.0] * 4)

    _, scored = score(Poisoned(CHECKPOINT, 30 * DAY_MS), [None] * ACCOUNTS, batch)

    assert scored.failed.keys() == {2}
    assert scored.before.keys() == {0, 1, 3}
    assert not scored.before[1].any()
    assert scored.before[3].any()
