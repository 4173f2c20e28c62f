"""Account filters: a sample has the same accounts in any order of the log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.audit.account_filter import AllAccounts, SampledAccounts, SingleAccount


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=200),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_a_sample_is_the_same_in_any_order_and_misses_no_transaction(
    log: list[int], size: int, random: object
) -> None:
    """Each account of the final sample was admitted at all of its transactions."""
    keys = [f"A{number}".encode() for number in log]
    sample = SampledAccounts(size)
    admitted = [(key, sample.admit(key)) for key in keys]
    sample.freeze()
    chosen = {key for key in keys if sample.selects(key)}

    other = SampledAccounts(size)
    shuffled = list(keys)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for key in shuffled:
        other.admit(key)

    assert len(chosen) == min(size, len(set(keys)))
    assert chosen == {key for key in keys if other.selects(key)}
    assert all(was_admitted for key, was_admitted in admitted if key in chosen)


def test_a_frozen_sample_admits_no_new_account() -> None:
    """The verifier loads states of the accounts that are selected by then."""
    sample = SampledAccounts(2)
    assert sample.admit(b"A1")
    sample.freeze()
    assert sample.admit(b"A1")
    assert not sample.admit(b"A2")


def test_all_accounts_and_a_single_account() -> None:
    """Keys are account ids in UTF-8."""
    assert AllAccounts().admit(b"x")
    assert AllAccounts().selects(b"x")
    one = SingleAccount("Kö")
    assert one.admit("Kö".encode())
    assert not one.selects(b"K")
