"""What verifying finds: counts, largest differences, and the accounts that are named."""

from __future__ import annotations

from dataclasses import dataclass, field

DETAILS_MAX = 10_000
"""Accounts that are named of each kind; all are counted."""


@dataclass(frozen=True)
class Difference:
    """An account that is not what the log says.

    Attributes:
        what: is wrong.
        offset: the first one whose score differs, or where the state began anew; None where it is
            the state alone, so that the log cannot tell since when.
        hidden, score: largest differences; None where there is nothing to compare.
    """

    account_id: str
    partition: int
    what: str
    offset: int | None
    hidden: float | None
    score: float | None


@dataclass
class Verification:
    """What was found.

    Attributes:
        records, transactions: of the log, up to the watermarks read first.
        not_applied: records of the log past them.
        accounts: compared with Redis; ``right`` of them are what the log says.
        expired: that Redis let go as it should.
        largest_hidden, largest_score: differences, of all that could be compared.
        scores: compared.
        missing, duplicate, conflicting: scores by their source.
        first_missing, first_conflicting: partition and offset.
        unexpected: scores of records that must have none: rejected, or repeats.
        foreign_model: scores of other models, not compared.
        unverifiable_scores: of accounts whose history is not wholly known at that transaction.
        without_log: states of accounts without a transaction in the log; None: not looked for.
        lost_partitions: with published scores, and no watermark in Redis.
        unverifiable, differences: accounts with what is the matter, at most DETAILS_MAX of each.
        unverifiable_accounts, different_accounts: how many there are.
    """

    records: int = 0
    transactions: int = 0
    not_applied: int = 0
    accounts: int = 0
    right: int = 0
    expired: int = 0
    largest_hidden: float = 0.0
    largest_score: float = 0.0
    scores: int = 0
    missing: int = 0
    duplicate: int = 0
    conflicting: int = 0
    first_missing: tuple[int, int] | None = None
    first_conflicting: tuple[int, int] | None = None
    unexpected: int = 0
    foreign_model: int = 0
    unverifiable_scores: int = 0
    without_log: int | None = 0
    lost_partitions: list[int] = field(default_factory=list)
    unverifiable_accounts: int = 0
    different_accounts: int = 0
    unverifiable: list[tuple[str, int, str]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Nothing contradicts the log, as far as it can be verified."""
        return not (
            self.different_accounts
            or self.missing
            or self.conflicting
            or self.unexpected
            or self.without_log
            or self.lost_partitions
        )

    def differs(self, difference: Difference) -> None:
        """Note an account that is not what the log says."""
        self.different_accounts += 1
        if len(self.differences) < DETAILS_MAX:
            self.differences.append(difference)

    def cannot_verify(self, account_id: str, partition: int, why: str) -> None:
        """Note an account of which the log does not tell enough."""
        self.unverifiable_accounts += 1
        if len(self.unverifiable) < DETAILS_MAX:
            self.unverifiable.append((account_id, partition, why))

    def add(self, other: Verification) -> None:
        """Add what was found in another partition."""
        for name in (
            "records transactions not_applied accounts right expired scores missing duplicate"
            " conflicting unexpected foreign_model unverifiable_scores unverifiable_accounts"
            " different_accounts"
        ).split():
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_hidden = max(self.largest_hidden, other.largest_hidden)
        self.largest_score = max(self.largest_score, other.largest_score)
        self.first_missing = self.first_missing or other.first_missing
        self.first_conflicting = self.first_conflicting or other.first_conflicting
        self.lost_partitions += other.lost_partitions
        self.unverifiable += other.unverifiable[: DETAILS_MAX - len(self.unverifiable)]
        self.differences += other.differences[: DETAILS_MAX - len(self.differences)]
