"""The decision about a chunk, as a table, and the order of a partition's transitions."""

from __future__ import annotations

from itertools import product
from typing import Literal

import msgspec
import pytest

from pipeline.scoring.owned_partition import OwnedPartition
from pipeline.scoring.ownership import ChunkDecision, ChunkFacts, decide_chunk

ANY = None
ROWS: list[tuple[object, ...]] = [
    # watermark, other log, fetched of it, before seek, begins past, first past
    ("not owned", ANY, ANY, ANY, ANY, ANY, ChunkDecision.TAKE_OVER),
    ("other", ANY, ANY, ANY, ANY, ANY, ChunkDecision.TAKE_OVER),
    ("expected", True, ANY, ANY, ANY, ANY, ChunkDecision.TAKE_OVER),
    ("expected", False, True, ANY, ANY, ANY, ChunkDecision.FETCH_AGAIN),
    ("expected", False, False, True, ANY, ANY, ChunkDecision.DROP),
    ("expected", False, False, False, True, ANY, ChunkDecision.SEEK_BACK),
    ("expected", False, False, False, False, True, ChunkDecision.SKIP_DELETED),
    ("expected", False, False, False, False, False, ChunkDecision.CONTINUE),
]
EITHER = (False, True)
WATERMARKS: tuple[Literal["not owned", "other", "expected"], ...] = (
    "not owned",
    "other",
    "expected",
)


def _fits(row: tuple[object, ...], facts: ChunkFacts) -> bool:
    return all(
        wanted in (ANY, found)
        for wanted, found in zip(row[:-1], msgspec.structs.astuple(facts), strict=True)
    )


@pytest.mark.parametrize(
    "facts",
    [
        ChunkFacts(watermark, *others)
        for watermark in WATERMARKS
        for others in product(EITHER, EITHER, EITHER, EITHER, EITHER)
    ],
    ids=str,
)
def test_the_table_has_one_row_for_all_facts_and_the_decision_is_its(facts: ChunkFacts) -> None:
    (row,) = [row for row in ROWS if _fits(row, facts)]

    assert decide_chunk(facts) is row[-1]


def _owned(scores_from: int = 7, scores_end: int = 7) -> OwnedPartition:
    return OwnedPartition(
        watermark=b"w0",
        next_offset=10,
        scores_from=scores_from,
        scores_end=scores_end,
        committed=12,
        producer_epoch=0,
        log_id=bytes(16),
        scores_log_id=bytes(16),
        scores_begin=0,
        stale_to=0,
    )


def test_a_save_expects_both_watermarks_until_the_one_after_next_begins() -> None:
    owned = _owned()

    owned.keep_computed(15, ["A", "B", "C"], [b"a", b"b", None])
    owned.begin_save(b"w1")

    assert owned.expects(b"w0")
    assert owned.expects(b"w1")
    assert (owned.computed_to, owned.next_offset, owned.watermark) == (15, 10, b"w0")
    owned.end_save(b"w1", 15, states_max=2)
    assert owned.expects(b"w0")
    assert owned.expects(b"w1")
    assert (owned.next_offset, owned.watermark) == (15, b"w1")
    assert owned.states == {"B": b"b", "C": None}
    owned.begin_save(b"w2")
    assert not owned.expects(b"w0")
    assert not owned.expects(None)


def test_one_seek_is_under_way_until_its_records_come() -> None:
    owned = _owned()

    assert owned.start_seek()
    assert not owned.start_seek()
    owned.arrived()
    assert owned.start_seek()


def test_only_offsets_that_the_log_lost_are_skipped() -> None:
    owned = _owned()

    assert owned.skip_to(9) == 0
    assert owned.computed_to == 10
    assert owned.skip_to(13) == 3
    assert owned.computed_to == 13
    assert owned.alerts_from == 12


def test_scores_stand_from_the_last_append_once_all_older_ones_are_applied() -> None:
    owned = _owned(scores_from=3, scores_end=7)

    assert owned.unread_scores(20) == (3, 7)
    assert owned.next_scores_from(15, 9) == 3  # those of [3, 7) are not read yet
    owned.add_read_scores({}, 7)
    assert owned.unread_scores(20) is None
    assert owned.note_appended(8, 9) == (7, 8)  # another worker published at 7
    assert owned.next_scores_from(16, 9) == 9


def test_no_other_module_changes_a_partition() -> None:
    owned = _owned()
    constants = {"alerts_from", "producer_epoch", "log_id", "scores_log_id"}
    constants |= {"scores_begin", "stale_to"}  # Final, so mypy refuses to assign them

    for name in dir(owned):
        if name.startswith("_") or callable(getattr(owned, name)) or name in constants:
            continue
        with pytest.raises(AttributeError):
            setattr(owned, name, None)
