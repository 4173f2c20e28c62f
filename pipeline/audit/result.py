"""Result of a verification: counts, largest differences, and the accounts concerned."""

from __future__ import annotations

from dataclasses import dataclass, field

DETAILS_MAX = 10_000
"""Most accounts that are listed for each kind of finding; all are counted."""


@dataclass(frozen=True)
class Difference:
    """An account that contradicts the log.

    Attributes:
        what: the contradiction, as a text for a person.
        offset: first offset whose score differs, or where the state began; None if only the state
            differs, so that the log does not show since when.
        hidden, score: largest differences; None if not comparable.
    """

    account_id: str
    partition: int
    what: str
    offset: int | None
    hidden: float | None
    score: float | None


@dataclass
class Verification:
    """Findings of a verification.

    Attributes:
        records, transactions: numbers in the log, up to the watermarks that were read first.
        not_applied: number of records of the log past these watermarks.
        accounts: number of accounts compared with Redis; ``right`` of them match the log.
        expired: number of accounts whose state expired in Redis as it should.
        largest_hidden, largest_score: largest of all comparable differences.
        scores: number of compared scores.
        missing, duplicate, conflicting: numbers of scores, by source.
        first_missing, first_conflicting: partition and offset.
        unexpected: number of scores of rejected or repeated records.
        foreign_model: number of scores of other models, not compared.
        unverifiable_scores: number of scores whose account's history is not fully in the log.
        without_log: number of states without a transaction in the log; None if not searched.
        lost_partitions: partitions with published scores but no watermark in Redis.
        unverifiable, differences: accounts with the reason, at most DETAILS_MAX of each.
        unverifiable_accounts, different_accounts: their full numbers.
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
        """Whether nothing contradicts the log, as far as it can be verified."""
        return not (
            self.different_accounts
            or self.missing
            or self.conflicting
            or self.unexpected
            or self.without_log
            or self.lost_partitions
        )

    def add_difference(self, difference: Difference) -> None:
        """Add an account that contradicts the log."""
        self.different_accounts += 1
        if len(self.differences) < DETAILS_MAX:
            self.differences.append(difference)

    def add_unverifiable(self, account_id: str, partition: int, why: str) -> None:
        """Add an account whose history is not fully in the log."""
        self.unverifiable_accounts += 1
        if len(self.unverifiable) < DETAILS_MAX:
            self.unverifiable.append((account_id, partition, why))

    def add(self, other: Verification) -> None:
        """Add the findings of another partition."""
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
