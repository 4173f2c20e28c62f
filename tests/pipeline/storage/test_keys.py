"""Keys: a partition in one slot of Redis Cluster, and distinct keys for distinct things."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from pipeline.storage.keys import Keys

account_ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256)
topics = st.text("abcXYZ019._-", min_size=1, max_size=40)


@given(topics, st.integers(0, 9999), st.lists(account_ids, max_size=20))
def test_a_partition_lies_in_one_slot_for_any_names_of_accounts(
    topic: str, partition: int, accounts: list[str]
) -> None:
    keys = Keys("recur", "0f3a5b7c9d1e", topic)

    slots = {key_slot(key) for key in keys.accounts(partition, accounts)}

    assert slots <= {key_slot(keys.watermark(partition))}


def test_partitions_lie_in_different_slots_so_that_a_cluster_shares_the_load() -> None:
    keys = Keys("recur", "0f3a5b7c9d1e", "transactions")

    assert len({key_slot(keys.watermark(partition)) for partition in range(64)}) > 60


@given(st.lists(account_ids, unique=True, min_size=2, max_size=20))
def test_no_account_shares_a_key_with_another_or_with_the_watermark(accounts: list[str]) -> None:
    keys = Keys("recur", "m", "transactions")

    names = [keys.watermark(0), *keys.accounts(0, accounts), *keys.accounts(1, accounts)]

    assert len(set(names)) == 1 + 2 * len(accounts)


def test_another_model_prefix_or_topic_has_other_keys() -> None:
    everything = [
        Keys("recur", "m1", "transactions"),
        Keys("recur", "m2", "transactions"),
        Keys("other", "m1", "transactions"),
        Keys("recur", "m1", "other"),
    ]

    assert len({keys.watermark(0) for keys in everything}) == len(everything)


@given(topics, st.integers(0, 99), st.lists(account_ids, unique=True, max_size=9))
def test_answers_lie_with_the_states_and_are_no_states(
    topic: str, partition: int, names: list[str]
) -> None:
    keys = Keys("recur", "m", topic)

    answers = keys.answers(partition, names)

    assert len({*answers, *keys.accounts(partition, names)}) == 2 * len(names)
    assert {key_slot(key) for key in answers} <= {key_slot(keys.watermark(partition))}
    assert all(keys.account_of(key) is None for key in answers)
    pattern_begin = f"recur:m:{{{topic}-{partition}}}:".encode()
    assert not any(key.startswith(pattern_begin) for key in answers)
