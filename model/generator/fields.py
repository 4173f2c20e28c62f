"""Extra fields of a data set: whose they are, their classes, and how values are drawn.

A field belongs to the account, the merchant or the transaction, by what it is constant for.
A text is kept only if several accounts have it, so no text identifies one person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from model.data.dataset import MISSING, Dataset
from model.generator.memory import FIELD_BINS

Int64 = NDArray[np.int64]
Floats = NDArray[np.float64]

TEXT_ACCOUNTS_MIN = 5
"""Fewest accounts that must have a text."""

CONSTANT_SHARE = 0.95
"""Share of the accounts or merchants for which a field must be constant to belong to them."""

Owner = Literal["account", "merchant", "transaction"]


class GeneratedField(msgspec.Struct, frozen=True):
    """An extra field.

    Attributes:
        name: as in a transaction.
        owner: what decides it.
        texts: texts by class of a categorical field; the class after them is missing.
        edges: edges of the classes of a numeric field; the class after them is missing.
        decimals: of a numeric field.
        shares: cumulative shares of the classes.
        groups: whether its classes are the groups of merchants.
        group_shares: cumulative shares in each group, of another field of merchants.
    """

    name: str
    owner: Owner
    texts: list[str] = []
    edges: list[float] = []
    decimals: int = 2
    shares: list[float] = []
    groups: bool = False
    group_shares: list[list[float]] = []

    @property
    def is_numeric(self) -> bool:
        """Whether its values are numbers."""
        return bool(self.edges)

    @property
    def classes(self) -> int:
        """Number of classes, the missing one included."""
        return 1 + (len(self.edges) - 1 if self.edges else len(self.texts))

    @property
    def unseen(self) -> list[int]:
        """Classes that the data do not have, such as the missing one."""
        return np.flatnonzero(np.diff([0.0, *self.shares]) <= 0).tolist()

    def drawn(self, share: Floats, group: Int64 | None = None) -> Int64:
        """Return classes by shares [n] from 0 to 1, of merchants in groups [n]."""
        if self.group_shares and group is not None:
            edges = np.array(self.group_shares)[group, :-1]
            return np.asarray((edges <= share[:, None]).sum(1), np.int64)
        found = np.searchsorted(np.array(self.shares[:-1]), share, side="right")
        return np.asarray(found, np.int64)

    def numbers(self, classes: Int64, share: Floats) -> Floats:
        """Return numbers [n] within classes; the missing one gives NaN."""
        edges = np.array(self.edges)
        place = np.minimum(classes, len(edges) - 2)
        value = np.round(edges[place] + share * (edges[place + 1] - edges[place]), self.decimals)
        return np.where(classes == len(edges) - 1, np.nan, value)


@dataclass(frozen=True)
class MeasuredFields:
    """The extra fields of the training data.

    Attributes:
        fields: see :class:`GeneratedField`.
        classes: [N, F] of the transactions.
        group: [merchants] groups of the merchants, from 0.
        groups: number of groups.
    """

    fields: list[GeneratedField]
    classes: NDArray[np.int8]
    group: Int64
    groups: int

    @property
    def own(self) -> list[int]:
        """Places of the fields that belong to the transaction."""
        return [place for place, field in enumerate(self.fields) if field.owner == "transaction"]


def measure_fields(log: Dataset) -> MeasuredFields:
    """Describe the extra fields, and choose one whose classes are the groups of merchants."""
    found, columns = [], []
    for name, codes in log.categorical.items():
        field, classes = _categorical(log, name, np.asarray(codes))
        found.append(field)
        columns.append(classes)
    for name, values in log.numeric.items():
        field, classes = _numeric(log, name, np.asarray(values, np.float64))
        found.append(field)
        columns.append(classes)
    table = np.stack(columns, 1) if columns else np.zeros((len(log), 0), np.int64)
    group, groups = np.zeros(int(log.merchant.max()) + 1, np.int64), 1
    leading = _leading(log, found, table)
    if leading is not None:
        groups = found[leading].classes
        group[log.merchant] = table[:, leading]
        found = [
            msgspec.structs.replace(field, groups=True)
            if place == leading
            else _in_groups(log, field, table[:, place], group, groups)
            for place, field in enumerate(found)
        ]
    return MeasuredFields(found, table.astype(np.int8), group, groups)


def _in_groups(
    log: Dataset, field: GeneratedField, classes: Int64, group: Int64, groups: int
) -> GeneratedField:
    """Return a field of merchants with its shares in each group; another field as it is."""
    if field.owner != "merchant":
        return field
    merchants, first = np.unique(log.merchant, return_index=True)
    cell = group[merchants] * field.classes + classes[first]
    counts = np.bincount(cell, minlength=groups * field.classes).reshape(groups, -1).astype(float)
    counts += 1e-3 * np.diff([0.0, *field.shares])
    shares = np.cumsum(counts / counts.sum(1, keepdims=True), 1)
    return msgspec.structs.replace(field, group_shares=shares.tolist())


def _leading(log: Dataset, fields: list[GeneratedField], classes: Int64) -> int | None:
    """Return the field of merchants that says most about amounts; None if there is none."""
    value = np.log(np.maximum(log.amount, 1e-2))
    value -= (np.bincount(log.account, value) / np.maximum(np.bincount(log.account), 1))[
        log.account
    ]
    said: dict[int, float] = {}
    for place, field in enumerate(fields):
        if field.owner == "merchant":
            count = np.bincount(classes[:, place], minlength=field.classes)
            total = np.bincount(classes[:, place], value, field.classes)
            said[place] = float((total**2 / np.maximum(count, 1)).sum())
    return max(said, key=lambda place: said[place]) if said else None


def _categorical(log: Dataset, name: str, codes: NDArray[np.int32]) -> tuple[GeneratedField, Int64]:
    texts = log.texts[name]
    there = codes != MISSING
    pairs = np.unique(codes[there].astype(np.int64) * (1 << 32) + log.account[there]) >> 32
    accounts = np.bincount(pairs, minlength=len(texts))
    rows = np.bincount(codes[there], minlength=len(texts))
    kept = [int(c) for c in np.argsort(-rows, kind="stable") if accounts[c] >= TEXT_ACCOUNTS_MIN]
    kept = kept[: FIELD_BINS - 1]
    place = np.full(len(texts) + 1, len(kept), np.int64)
    place[kept] = np.arange(len(kept))
    classes = place[codes]
    owner = _owner(log, classes)
    field = GeneratedField(
        name, owner, texts=[texts[c] for c in kept], shares=_shares(log, classes, owner, len(kept))
    )
    return field, classes


def _numeric(log: Dataset, name: str, values: Floats) -> tuple[GeneratedField, Int64]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        finite = np.zeros(1)
    few = max(1, min(5, len(finite) // 100))
    ordered = np.sort(finite)
    edges = np.quantile(ordered[few - 1 : len(ordered) - few + 1], np.linspace(0, 1, FIELD_BINS))
    edges = np.unique(edges)
    if len(edges) == 1:
        edges = np.array([edges[0], edges[0]])
    classes = classes_of(values, edges)
    decimals = next(
        (d for d in range(6) if np.mean(np.abs(finite - np.round(finite, d)) < 1e-4) > 0.99), 6
    )
    owner = _owner(log, classes)
    shares = _shares(log, classes, owner, len(edges) - 1)
    field = GeneratedField(name, owner, edges=edges.tolist(), decimals=decimals, shares=shares)
    return field, classes


def classes_of(values: Floats, edges: Floats) -> Int64:
    """Return the classes [N] of numbers between edges; the class after them is missing."""
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return np.where(np.isfinite(values), place, len(edges) - 1)


def _owner(log: Dataset, classes: Int64) -> Owner:
    owners: tuple[tuple[Owner, NDArray[np.int32]], ...] = (
        ("account", log.account),
        ("merchant", log.merchant),
    )
    for owner, codes in owners:
        count = np.bincount(codes)
        low = np.full(len(count), FIELD_BINS + 1)
        high = np.full(len(count), -1)
        np.minimum.at(low, codes, classes)
        np.maximum.at(high, codes, classes)
        several = count >= 2
        if several.any() and np.mean((low == high)[several]) >= CONSTANT_SHARE:
            return owner
    return "transaction"


def _shares(log: Dataset, classes: Int64, owner: Owner, last: int) -> list[float]:
    """Return the cumulative shares of the classes among the owners."""
    if owner != "transaction":
        codes = log.account if owner == "account" else log.merchant
        first = np.unique(codes, return_index=True)[1]
        classes = classes[first]
    counts = np.bincount(classes, minlength=last + 1).astype(float)
    return [float(v) for v in np.cumsum(counts / counts.sum())]
