"""Samples of accounts: the same ones whatever the order in which accounts are met."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.audit.account_filter import AllAccounts, SingleAccount, SampledAccounts


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=200),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_a_sample_is_the_same_in_any_order_and_misses_no_transaction(
    log: list[int], size: int, random: object
) -> None:
    """An account of the final sample was taken at its every transaction, from the first on."""
    keys = [f"A{number}".encode() for number in log]
    sample = SampledAccounts(size)
    taken = [(key, sample.admit(key)) for key in keys]
    sample.freeze()
    chosen = {key for key in keys if sample.selects(key)}

    other = SampledAccounts(size)
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for key in shuffled:
        other.admit(key)

    assert len(chosen) == min(size, len(set(keys)))
    assert chosen == {key for key in keys if other.selects(key)}
    assert all(was_taken for key, was_taken in taken if key in chosen)


def test_a_settled_sample_takes_no_account_that_begins_later() -> None:
    """States are loaded for the accounts that are chosen by then."""
    sample = SampledAccounts(2)
    assert sample.admit(b"A1")
    sample.freeze()
    assert sample.admit(b"A1")
    assert not sample.admit(b"A2")


def test_everyone_and_one() -> None:
    """Keys are account ids in UTF-8."""
    assert AllAccounts().admit(b"x")
    assert AllAccounts().selects(b"x")
    one = SingleAccount("Kö")
    assert one.admit("Kö".encode())
    assert not one.selects(b"K")
