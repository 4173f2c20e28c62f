"""Column mappings: the columns of a file that hold the fields of a transaction, in TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from model.features.spec import FEATURES
from model.transaction import Transaction
from pipeline.errors import RecurError

SHIPPED = Path(__file__).parent / "mappings"
EXAMPLE = "example"

T = TypeVar("T")

OPTIONAL_FIELDS = ("category", "channel", "country")
"""Optional fields of a transaction, in the order of its definition."""

EXTRA_FIELDS_MAX = 64
"""Limit of the numeric and categorical fields besides those of a transaction."""

FIELD_NAME_MAX_CHARACTERS = 64


class ColumnNames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Column name of each field; ``label`` and ``scenario`` are the truth, which is not sent."""

    transaction_id: str | None = None
    """Column of the ids; replay needs it, training does not."""
    account_id: str
    merchant_id: str
    amount: str
    timestamp: str
    currency: str | None = None
    category: str | None = None
    channel: str | None = None
    country: str | None = None
    label: str | None = None
    scenario: str | None = None


class Constants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values that all transactions get."""

    currency: str | None = None
    category: str | None = None
    channel: str | None = None
    country: str | None = None


class Prefixes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Texts to put before the ids."""

    transaction_id: str = ""
    account_id: str = ""
    merchant_id: str = ""


class TimeForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Form of a time: ``unit`` of numbers, ``format`` (strptime) of text, and ``zone``."""

    unit: Literal["s", "ms", "us", "ns"] | None = None
    format: str | None = None
    zone: str = "UTC"


class ExtraFieldColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Columns of extra fields: a list of columns, or column by field name."""

    numeric: list[str] | dict[str, str] = []
    categorical: list[str] | dict[str, str] = []


class ColumnMapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a mapping file for transactions."""

    columns: ColumnNames
    fields: ExtraFieldColumns = ExtraFieldColumns()
    constants: Constants = Constants()
    prefixes: Prefixes = Prefixes()
    time: TimeForm = TimeForm()

    def columns_by_field(self) -> dict[str, str]:
        """Collect the columns by field, of the fields that have one."""
        return {
            field: column
            for field, column in msgspec.structs.asdict(self.columns).items()
            if column is not None
        }

    @property
    def numeric(self) -> dict[str, str]:
        """Columns of the extra numeric fields, by name in a transaction."""
        return _by_name(self.fields.numeric)

    @property
    def categorical(self) -> dict[str, str]:
        """Columns of the extra categorical fields, by name in a transaction."""
        return _by_name(self.fields.categorical)


class LabelColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Column name of each field in a file of labels."""

    transaction_id: str = "transaction_id"
    account_id: str = "account_id"
    merchant_id: str = "merchant_id"
    label: str = "label"
    timestamp: str = "timestamp"
    labelled_at: str = "labelled_at"
    merchant_weight: str = "merchant_weight"
    """Optional column."""


class LabelMapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a mapping file for labels; ``time`` is the form of both times."""

    columns: LabelColumns = LabelColumns()
    prefixes: Prefixes = Prefixes()
    time: TimeForm = TimeForm()


def load_label_mapping(path: Path | None) -> LabelMapping:
    """Read a mapping for a file of labels; without a path, columns have the fields' names.

    Raises:
        RecurError: the file is missing or not a mapping; the message names the wrong key.
    """
    if path is None:
        return LabelMapping()
    mapping = _decode(path, LabelMapping)
    _check_zone(path, mapping.time)
    return mapping


def load_mapping(name: str | Path) -> ColumnMapping:
    """Read a mapping from a path, or a shipped one by its name, such as ``handbook``.

    Raises:
        RecurError: the mapping is missing or wrong; the message names the wrong key.
    """
    path = Path(name)
    if not path.is_file():
        shipped = SHIPPED / f"{name}.toml"
        if path.name != str(name) or not shipped.is_file():
            raise RecurError(
                f"there is no column mapping {name}: name a TOML file"
                f" (`recur replay --example-columns` prints one) or one of {shipped_mappings()}"
            )
        path = shipped
    mapping = _decode(path, ColumnMapping)
    _check(path, mapping)
    return mapping


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise RecurError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecurError(f"{path} cannot be read: {error}") from None


def shipped_mappings() -> str:
    """List the names that :func:`load_mapping` knows, comma-separated."""
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.toml") if path.stem != EXAMPLE))


def example_mapping() -> str:
    """Read the example mapping, which explains every key."""
    return (SHIPPED / f"{EXAMPLE}.toml").read_text(encoding="utf-8")


def _by_name(fields: list[str] | dict[str, str]) -> dict[str, str]:
    return fields if isinstance(fields, dict) else {column: column for column in fields}


def _check_extra_fields(path: Path, mapping: ColumnMapping) -> None:
    """Check that a transaction can carry the extra fields: their number, names and uniqueness."""
    names = [
        name
        for fields in (mapping.fields.numeric, mapping.fields.categorical)
        for name in fields  # a list may name a column twice
    ]
    if len(names) > EXTRA_FIELDS_MAX:
        raise RecurError(
            f"{path}: {len(names)} columns under [fields], and at most {EXTRA_FIELDS_MAX} are"
            " allowed: remove some"
        )
    taken = {*Transaction.__struct_fields__, "label", "scenario", *FEATURES}
    for name in names:
        if not 1 <= len(name) <= FIELD_NAME_MAX_CHARACTERS or not name.isprintable():
            raise RecurError(
                f"{path}: {name[:80]!r} under [fields] cannot be a field's name: it must have 1 to"
                f" {FIELD_NAME_MAX_CHARACTERS} printable characters; rename it, as in"
                ' numeric = { distance = "its column" }'
            )
        if name in taken:
            raise RecurError(
                f"{path}: {name} under [fields] exists already (as a field of a transaction, as a"
                " feature, or twice here): remove it or rename it, as in numeric = { my_"
                f'{name} = "its column" }}'
            )
        taken.add(name)


def _check(path: Path, mapping: ColumnMapping) -> None:
    _check_extra_fields(path, mapping)
    for field, value in msgspec.structs.asdict(mapping.constants).items():
        if value is not None and getattr(mapping.columns, field) is not None:
            raise RecurError(f"{path}: {field} is under [columns] and under [constants]: keep one")
    if mapping.columns.currency is None and mapping.constants.currency is None:
        raise RecurError(
            f'{path}: no currency: write currency = "EUR" (or another) under [constants],'
            " or name a column of it under [columns]"
        )
    constant = mapping.constants.currency
    if constant is not None and len(constant) != 3:
        raise RecurError(f"{path}: constants.currency must be an ISO 4217 code such as EUR")
    _check_zone(path, mapping.time)


def _check_zone(path: Path, form: TimeForm) -> None:
    try:
        ZoneInfo(form.zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise RecurError(
            f"{path}: time.zone {form.zone!r} is not a known time zone;"
            " write one such as UTC or Europe/Madrid"
        ) from None
