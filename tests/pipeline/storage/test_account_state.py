"""A state's bytes: small, exact, and invalid if any bit changed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from model.features.account import WINDOW_DAYS, AccountHistory
from pipeline.storage.account_state import (
    RECENT_IDS,
    STATE_FORMAT,
    AccountStates,
    StateCodec,
    layout,
)
from pipeline.storage.watermark import Watermark

WINDOWS = len(WINDOW_DAYS)


def column(dtype: str, n: int, *shape: int) -> st.SearchStrategy[NDArray[Any]]:
    """Draw an array [n, *shape] of any numbers of a type, infinities and NaN included."""
    return arrays.arrays(np.dtype(dtype), (n, *shape))


@st.composite
def codecs_and_states(draw: st.DrawFn) -> tuple[StateCodec, AccountStates]:
    codec = StateCodec(draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8])))
    n = draw(st.integers(0, 4))
    count = draw(arrays.arrays(np.uint32, n, elements=st.integers(1, 2**32 - 1)))
    states = codec.empty(n)
    states.first_offset[:] = draw(column("i8", n))
    states.last_offset[:] = draw(column("i8", n))
    states.last_record_ms[:] = draw(column("i8", n))
    states.history.put(
        slice(None),
        AccountHistory(
            last_event_ms=draw(column("i8", n)),
            count=count,
            decayed_count=draw(column("f4", n, WINDOWS)),
            decayed_amount=draw(column("f4", n, WINDOWS)),
            usual_amount=draw(column("f4", n)),
            usual_count=draw(column("u1", n)),
        ),
    )
    states.recent_ids[:] = draw(column("u8", n, RECENT_IDS))
    states.hidden[:] = draw(column("f2", n, codec.layers, codec.hidden_size))
    return codec, states


def columns_of(states: AccountStates) -> dict[str, NDArray[Any]]:
    """Return all columns of states but the checksum, which only the codec fills in."""
    names = [name for name in states.table.dtype.names or () if name != "checksum"]
    return {name: states.table[name] for name in names}


def values_of(codec: StateCodec, n: int = 1) -> list[bytes]:
    """Return n valid values of different accounts."""
    states = codec.empty(n)
    states.history.count[:] = np.arange(1, n + 1)
    states.last_offset[:] = 41
    states.hidden[:] = np.linspace(-1, 1, states.hidden[0].size).reshape(states.hidden[0].shape)
    return codec.encode(states, np.arange(n))


def refused(codec: StateCodec, value: bytes) -> bool:
    """Return whether a value is invalid and its account counts as one without a state."""
    states, loaded, refusals = codec.decode([value])
    absent = int(states.history.count[0]) == 0 and not states.hidden.any()
    assert absent == (not loaded[0]) == (refusals == 1)
    return refusals == 1


@pytest.mark.slow
@given(codecs_and_states())
def test_every_bit_of_a_state_survives_the_round_trip(
    codec_and_states: tuple[StateCodec, AccountStates],
) -> None:
    codec, states = codec_and_states

    values = codec.encode(states, np.arange(len(states)))
    decoded, loaded, refusals = codec.decode(values)

    assert loaded.all()
    assert refusals == 0
    expected, found = columns_of(states), columns_of(decoded)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


@given(codecs_and_states(), st.data())
def test_only_the_requested_rows_are_encoded_in_order(
    codec_and_states: tuple[StateCodec, AccountStates], data: st.DataObject
) -> None:
    codec, states = codec_and_states
    everything = codec.encode(states, np.arange(len(states)))
    rows = data.draw(st.permutations(range(len(states))))[: len(states) // 2 + 1]

    assert codec.encode(states, np.array(rows, np.intp)) == [everything[row] for row in rows]


@pytest.mark.parametrize(("layers", "hidden_size"), [(1, 8), (2, 3)])
def test_a_state_with_any_single_bit_flipped_is_invalid(layers: int, hidden_size: int) -> None:
    codec = StateCodec(layers, hidden_size)
    (value,) = values_of(codec)
    flipped = []
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.append(bytes(damaged))

    states, loaded, refusals = codec.decode(flipped)

    assert not loaded.any()
    assert refusals == len(flipped)
    assert not states.history.count.any()


@given(st.binary(max_size=400))
def test_random_bytes_are_invalid(value: bytes) -> None:
    assert refused(StateCodec(1, 128), value)


def test_random_bytes_of_the_right_size_are_invalid() -> None:
    codec = StateCodec(1, 128)
    noise = hashlib.shake_128(b"noise").digest(codec.size_bytes * 1000)
    values = [noise[i : i + codec.size_bytes] for i in range(0, len(noise), codec.size_bytes)]

    assert codec.decode(values)[2] == 1000


def test_a_shorter_or_longer_state_is_invalid() -> None:
    codec = StateCodec(1, 8)
    (value,) = values_of(codec)

    assert not refused(codec, value)
    for damaged in (b"", value[:1], value[:-8], value[:-1], value + b"\0", value + b"\0" * 8):
        assert refused(codec, damaged), len(damaged)


def test_a_state_of_another_network_of_the_same_size_is_invalid() -> None:
    four_by_two, two_by_four = StateCodec(4, 2), StateCodec(2, 4)
    assert four_by_two.size_bytes == two_by_four.size_bytes
    (value,) = values_of(four_by_two)

    assert not refused(four_by_two, value)
    assert refused(two_by_four, value)


def test_a_state_of_another_format_version_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = StateCodec(1, 8)
    monkeypatch.setattr("pipeline.storage.account_state.STATE_FORMAT", STATE_FORMAT + 1)
    (value,) = values_of(StateCodec(1, 8))
    monkeypatch.undo()

    assert refused(newer, value)


def test_an_invalid_state_does_not_change_its_neighbours() -> None:
    codec = StateCodec(1, 8)
    first, second = values_of(codec, 2)

    states, loaded, refusals = codec.decode([first, b"junk", None, second])

    assert loaded.tolist() == [True, False, False, True]
    assert refusals == 1
    assert states.history.count.tolist() == [1, 0, 0, 2]
    assert states.last_offset.tolist() == [41, -1, -1, 41]


def test_a_state_without_transactions_is_reset() -> None:
    """No worker writes such a state. Its hidden state must not pass to a new account."""
    codec = StateCodec(1, 8)
    (value,) = values_of(codec)
    table = np.frombuffer(value, codec.dtype).copy()
    table["count"] = 0
    table["hidden"] = 0.5

    states, loaded, refusals = codec.decode([codec._sealed(table).tobytes(), None])

    assert not loaded.any()
    assert refusals == 1
    assert len(set(codec.encode(states, np.arange(2)))) == 1


def test_an_empty_list_of_states_is_decoded_and_encoded() -> None:
    codec = StateCodec(1, 8)

    states, loaded, refusals = codec.decode([])

    assert (len(states), len(loaded), refusals) == (0, 0, 0)
    assert codec.encode(states, np.arange(0)) == []


def test_decoded_states_can_be_written_to() -> None:
    codec = StateCodec(1, 8)
    states, _, _ = codec.decode(values_of(codec, 2))

    states.reset(np.array([1]))

    assert states.history.count.tolist() == [1, 0]
    assert states.last_offset.tolist() == [41, -1]
    assert not states.hidden[1].any()


def test_a_state_of_one_layer_of_128_takes_at_most_450_bytes() -> None:
    assert StateCodec(1, 128).size_bytes <= 450


@pytest.mark.parametrize(("layers", "hidden_size"), [(1, 1), (1, 128), (3, 5), (8, 4096)])
def test_the_layout_is_little_endian_words_without_gaps(layers: int, hidden_size: int) -> None:
    dtype = layout(layers, hidden_size)

    assert dtype.itemsize % 8 == 0
    assert dtype.newbyteorder("<") == dtype
    end = 0
    for name in dtype.names or ():
        field, offset = dtype.fields[name][:2]  # type: ignore[index]
        assert offset == end, f"a gap before {name}"
        end = offset + field.itemsize
    assert end == dtype.itemsize


offsets = st.integers(0, 2**63 - 1)


@given(st.integers(1, 2**32 - 1), offsets, offsets, st.integers(0, 2**64 - 1))
def test_a_watermark_survives_the_round_trip(
    partitions: int, next_offset: int, scores_offset: int, writer: int
) -> None:
    mark = Watermark(partitions, next_offset, scores_offset, writer)
    other = Watermark(1, 2, 3, 4, bytes(range(16)), bytes(range(16, 32)), next_offset, 7)

    assert Watermark.from_bytes(mark.to_bytes()) == mark
    assert Watermark.from_bytes(other.to_bytes()) == other


@given(st.binary(max_size=64))
def test_a_watermark_of_another_size_or_format_is_rejected(value: bytes) -> None:
    if len(value) == 32 and value[0] == 1:  # format 1, without ids
        value = value[:-1]

    with pytest.raises(ValueError, match="unknown format"):
        Watermark.from_bytes(value)


@pytest.mark.parametrize("damaged", [(0, 1, 2, 3), (8, -1, 2, 3), (8, 1, -2, 3)])
def test_a_watermark_without_partitions_or_with_a_negative_offset_is_rejected(
    damaged: tuple[int, int, int, int],
) -> None:
    """Otherwise a worker would count the whole log as lost, or read from an impossible offset."""
    with pytest.raises(ValueError, match="damaged"):
        Watermark.from_bytes(Watermark(*damaged).to_bytes())


def test_watermarks_of_two_writers_at_one_offset_differ() -> None:
    assert Watermark(8, 1, 2, 3).to_bytes() != Watermark(8, 1, 2, 4).to_bytes()
