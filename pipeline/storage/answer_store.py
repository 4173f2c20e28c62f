"""Answer keys of transactions, as gateways claim and read them.

A gateway claims a transaction id before it produces the record, and a worker replaces the claim by
the answer (:mod:`pipeline.messages.replies`). The claim is one command that sets the key only if
there is none, and tells what stands there. So of any number of gateways one produces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.messages.replies import StoredAnswer
from pipeline.storage.client import RedisClient
from pipeline.storage.keys import Keys
from pipeline.storage.script import load_script

CLAIM_KEY = load_script("claim_key")
REPLACE_ANSWER = load_script("replace_answer")


class AnswerStore:
    """Store of answer keys in one Redis or a Redis Cluster.

    Args:
        redis: its client.
        keys: names the keys.
        expiry_ms: time to live of a claim.
    """

    def __init__(self, redis: RedisClient, keys: Keys, expiry_ms: int) -> None:
        self._redis = redis
        self._keys = keys
        self._expiry = b"%d" % expiry_ms

    async def claim(
        self, claims: Sequence[tuple[int, str, StoredAnswer]]
    ) -> list[StoredAnswer | None]:
        """Claim transactions, in order.

        Args:
            claims: partition, transaction id and claim of each.

        Returns:
            for each None if the claim stands now, else what stood there before.

        Raises:
            StoreUnavailableError: Redis does not answer; some claims may stand.
        """
        commands = [
            CLAIM_KEY.call(self._keys.answers(partition, [name]), claim.to_bytes(), self._expiry)
            for partition, name, claim in claims
        ]
        return [_answer(reply) for reply in await self._redis.execute(commands)]

    async def read(self, partition: int, transaction_id: str) -> StoredAnswer | None:
        """Read the answer key of a transaction.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        key = self._keys.answers(partition, [transaction_id])[0]
        (reply,) = await self._redis.execute([("GET", key)])
        return _answer(reply)

    async def find(self, partitions: int, transaction_id: str) -> list[tuple[int, StoredAnswer]]:
        """Look for a transaction in every partition: an id does not tell its account.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        replies = await self._redis.execute(
            [("GET", *self._keys.answers(p, [transaction_id])) for p in range(partitions)]
        )
        answers = [_answer(reply) for reply in replies]
        return [(p, answer) for p, answer in enumerate(answers) if answer is not None]

    async def replace(
        self, partition: int, transaction_id: str, expected: StoredAnswer, new: StoredAnswer | None
    ) -> bool:
        """Replace an answer key, or delete it, if it still has the expected value.

        Returns:
            whether it was replaced.

        Raises:
            StoreUnavailableError: Redis does not answer.
        """
        value = b"" if new is None else new.to_bytes()
        keys = self._keys.answers(partition, [transaction_id])
        call = REPLACE_ANSWER.call(keys, expected.to_bytes(), value, self._expiry)
        (reply,) = await self._redis.execute([call])
        return bool(reply)

    async def withdraw(self, claims: Sequence[tuple[int, str, StoredAnswer]]) -> None:
        """Delete claims, each if it still stands as it is.

        Args:
            claims: partition, transaction id and claim of each.

        Raises:
            StoreUnavailableError: Redis does not answer; some may be deleted.
        """
        await self._redis.execute(
            [
                REPLACE_ANSWER.call(
                    self._keys.answers(partition, [name]), claim.to_bytes(), b"", self._expiry
                )
                for partition, name, claim in claims
            ]
        )


def _answer(reply: Any) -> StoredAnswer | None:
    """Read a key's value; one of another version counts as none."""
    if reply is None:
        return None
    try:
        return StoredAnswer.from_bytes(reply)
    except ValueError:
        return None
