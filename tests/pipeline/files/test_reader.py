"""A person's own files become transactions, or a message that names the row."""

from __future__ import annotations

import gzip
import tracemalloc
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RecurError
from pipeline.files.column_mapping import ColumnMapping, example_mapping, load_mapping
from pipeline.files.reader import REPEAT_WINDOW_IDS, Part, TransactionFile

MAPPING = """
[columns]
transaction_id = "id"
account_id = "card"
merchant_id = "shop"
amount = "sum"
timestamp = "at"
{columns}
[constants]
currency = "EUR"
[prefixes]
account_id = "A"
[time]
{time}
"""
NOON_MS = 1_534_334_400_000  # 2018-08-15 12:00 UTC


def mapping(directory: Path, columns: str = "", time: str = "") -> ColumnMapping:
    path = directory / "mapping.toml"
    path.write_text(MAPPING.format(columns=columns, time=time))
    return load_mapping(path)


def table(**changes: Any) -> pa.Table:
    """Three good rows, a minute apart, with columns changed or added."""
    columns: dict[str, Any] = {
        "id": [1, 2, 3],
        "card": [17, 18, 17],
        "shop": ["x", "y", "x"],
        "sum": [1.5, 2.0, 3.25],
        "at": [datetime(2018, 8, 15, 12, minute, tzinfo=UTC) for minute in range(3)],
    }
    return pa.table(columns | changes)


def parts(source: pa.Table, directory: Path, **options: Any) -> list[Part]:
    path = directory / "file.parquet"
    pq.write_table(source, path)
    mapping_options = {k: options.pop(k) for k in ("columns", "time") if k in options}
    return list(TransactionFile(path, mapping(directory, **mapping_options), **options).parts())


def complaint(source: pa.Table, directory: Path, **options: Any) -> str:
    with pytest.raises(RecurError) as error:
        parts(source, directory, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def csv_file(directory: Path, *lines: str, name: str = "file.csv") -> TransactionFile:
    path = directory / name
    text = "\n".join(("id,card,shop,sum,at", *lines)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return TransactionFile(path, mapping(directory))


def test_rows_become_transactions_with_prefixes_and_constants(tmp_path: Path) -> None:
    (part,) = parts(table(), tmp_path)

    assert part.rows.tolist() == [1, 2, 3]
    assert part.transaction_ids == ["1", "2", "3"]
    assert part.account_ids == ["A17", "A18", "A17"]
    assert part.merchant_ids == ["x", "y", "x"]
    assert part.amounts == [1.5, 2.0, 3.25]
    assert part.currencies == ["EUR"] * 3
    assert part.timestamps_ms.tolist() == [NOON_MS, NOON_MS + 60_000, NOON_MS + 120_000]
    assert part.labels is None


@pytest.mark.parametrize(
    ("times", "form"),
    [
        (pa.array([NOON_MS + 7_200_000 + m * 60_000 for m in range(3)]).cast(pa.timestamp("ms")),
         'zone = "Europe/Madrid"'),
        (pa.array([(NOON_MS + m * 60_000) * 10**6 for m in range(3)]).cast(pa.timestamp("ns")), ""),
        ([1_534_334_400, 1_534_334_460, 1_534_334_520], 'unit = "s"'),
        ([1_534_334_400.0, 1_534_334_460.0, 1_534_334_520.0], 'unit = "s"'),
        ([NOON_MS * 1000, (NOON_MS + 60_000) * 1000, (NOON_MS + 120_000) * 1000], 'unit = "us"'),
        (["2018-08-15T12:00:00Z", "2018-08-15 12:01:00", "2018-08-15T14:02:00+02:00"], ""),
        (["15/08/2018 14:00", "15/08/2018 14:01", "15/08/2018 14:02"],
         'format = "%d/%m/%Y %H:%M"\nzone = "Europe/Madrid"'),
        (["1534334400", "1534334460", "1534334520"], 'unit = "s"'),
    ],
)  # fmt: skip
def test_times_are_read_in_every_documented_form(times: Any, form: str, tmp_path: Path) -> None:
    (part,) = parts(table(at=times), tmp_path, time=form)

    assert part.timestamps_ms.tolist() == [NOON_MS, NOON_MS + 60_000, NOON_MS + 120_000]


def test_dates_decimals_dictionaries_and_large_strings_are_read(tmp_path: Path) -> None:
    source = table(
        at=[date(2018, 8, 15)] * 3,
        sum=[Decimal("1.10"), Decimal("2.20"), Decimal("3.30")],
        shop=pa.array(["x", "y", "x"]).dictionary_encode(),
        id=pa.array(["007", "008", "009"], pa.large_string()),
    )
    (part,) = parts(source, tmp_path)

    assert part.amounts == [1.1, 2.2, 3.3]
    assert part.merchant_ids == ["x", "y", "x"]
    assert part.transaction_ids == ["007", "008", "009"]
    assert part.timestamps_ms.tolist() == [NOON_MS - 43_200_000] * 3


def test_labels_and_optional_fields_are_read_and_empty_ones_are_unknown(tmp_path: Path) -> None:
    source = table(fraud=["Fraud", "0", None], mcc=["5411", "", None], kind=[2, 0, 0])
    extra = 'label = "fraud"\nscenario = "kind"\ncategory = "mcc"'
    (part,) = parts(source, tmp_path, columns=extra)

    assert part.labels is not None
    assert part.labels.tolist() == [1, 0, -1]
    assert part.scenarios == ["2", "0", "0"]
    assert part.optional[0] == ["5411", None, None]


def test_offset_days_move_every_time(tmp_path: Path) -> None:
    (part,) = parts(table(), tmp_path, offset_ms=-86_400_000)

    assert part.timestamps_ms[0] == NOON_MS - 86_400_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sum": [1.0, -2.0, 3.0]}, "row 2: amount is negative"),
        ({"sum": [1.0, 2.0, None]}, "row 3: amount is missing or not finite"),
        ({"sum": [float("inf"), 2.0, 3.0]}, "row 1: amount is missing or not finite"),
        ({"sum": ["1", "2,5", "3"]}, "row 2: amount is not a number"),
        ({"sum": [1.0, 2e12, 3.0]}, "row 2: amount is over"),
        ({"card": [1, None, 3]}, "row 2: account_id is empty"),
        ({"shop": ["x", "", "y"]}, "row 2: merchant_id is empty"),
        ({"id": ["a", "b", "b" * 300]}, "row 3: transaction_id is over 256 characters"),
        ({"id": ["a", "b", "a"]}, "row 3: transaction_id repeats"),
        ({"at": ["2018-08-15", "soon", "2018-08-16"]}, "row 2: timestamp is not ISO 8601"),
        ({"at": [None, None, None]}, "timestamp"),
        ({"id": [1.0, 2.0, 3.0]}, "transaction_id: its column holds double"),
        ({"sum": [True, False, True], "id": [[1], [2], [3]]}, "transaction_id: its column holds"),
        ({"at": [1, 2, 3]}, 'say in the column mapping what the numbers count, as in [time] unit'),
    ],
)  # fmt: skip
def test_an_unusable_value_is_refused_with_its_row_number(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in complaint(table(**changes), tmp_path)


def test_rows_in_the_future_are_refused_with_the_option_that_helps(tmp_path: Path) -> None:
    future = [datetime(2999, 1, day, tzinfo=UTC) for day in (1, 2, 3)]

    assert "--offset-days" in complaint(table(at=future), tmp_path)


def test_milliseconds_that_a_worker_takes_for_seconds_are_refused_but_not_for_training(
    tmp_path: Path,
) -> None:
    source = table(at=[1_534_334_400 + second for second in range(3)], TX_FRAUD=[0, 1, 0])
    said = complaint(source, tmp_path, time='unit = "ms"')
    assert "row 1: timestamp is in 1970" in said
    assert "correct [time] unit" in said
    assert len(parts(source, tmp_path, time='unit = "s"')) == 1
    options: dict[str, Any] = {"columns": 'label = "TX_FRAUD"', "for_training": True}
    assert len(parts(source, tmp_path, time='unit = "ms"', **options)) == 1


def test_unusable_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(table(sum=[1.0, -2.0, 3.0]), path)
    file = TransactionFile(path, mapping(tmp_path), skip_unusable=True)
    (part,) = file.parts()

    assert part.rows.tolist() == [1, 3]
    assert part.amounts == [1.0, 3.0]
    assert file.left_out.rows == 1
    assert file.left_out.examples == ["row 2: amount is negative"]


def test_rows_out_of_order_are_refused_or_sent_as_they_stand(tmp_path: Path) -> None:
    backwards = table(at=[datetime(2018, 8, day, tzinfo=UTC) for day in (15, 17, 16)])

    said = complaint(backwards, tmp_path)
    assert "row 3" in said
    assert "--allow-unsorted" in said
    (part,) = parts(backwards, tmp_path, allow_unsorted=True)
    assert part.rows.tolist() == [1, 2, 3]


def test_order_and_repeats_are_seen_across_parts(tmp_path: Path) -> None:
    count = 20_000
    ids = [str(number) for number in range(count)]
    source = pa.table(
        {
            "id": ids,
            "card": ids,
            "shop": ids,
            "sum": np.ones(count),
            "at": pa.array(NOON_MS + np.arange(count)).cast(pa.timestamp("ms")),
        }
    )
    assert sum(len(part.rows) for part in parts(source, tmp_path)) == count
    ids[15_000] = "3"
    repeated = source.set_column(0, "id", pa.array(ids))
    assert "row 15,001: transaction_id repeats" in complaint(repeated, tmp_path)
    times = NOON_MS + np.arange(count)
    times[16_384] = 0  # first row of the third part
    unsorted = source.set_column(4, "at", pa.array(times).cast(pa.timestamp("ms")))
    assert "row 16,385" in complaint(unsorted, tmp_path)
    assert count < REPEAT_WINDOW_IDS


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    said = complaint(table().drop_columns(["card"]), tmp_path)

    assert "has no column card (account_id)" in said
    assert "id, shop, sum, at" in said


@pytest.mark.parametrize("name", ["file.csv", "file.csv.gz", "file.tsv"])
def test_csv_is_read_as_text_so_that_ids_keep_their_zeros(name: str, tmp_path: Path) -> None:
    rows = ["007,01,x,1.50,2018-08-15 12:00:00", "008,02,y,2,2018-08-15 12:01:00"]
    path = tmp_path / name
    text = "\n".join(["id,card,shop,sum,at", *rows])
    if name.endswith(".tsv"):
        text = text.replace(",", "\t")
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    file = TransactionFile(path, mapping(tmp_path))
    (part,) = file.parts()

    assert part.transaction_ids == ["007", "008"]
    assert part.account_ids == ["A01", "A02"]
    assert part.amounts == [1.5, 2.0]
    assert file.fraction_read == 1.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,2,x,1,2018-08-15", "2,2,x,abc,2018-08-15"], "row 2: amount is not a number"),
        (["1,2,x,1,2018-08-15", "2,2,x"], "row 2 has 3 fields where the header line has 5"),
        (["1,2,x,,2018-08-15"], "row 1: amount is missing"),
    ],
)
def test_a_wrong_csv_row_is_named_by_its_number_and_not_quoted(
    lines: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecurError, match=message) as error:
        list(csv_file(tmp_path, *lines).parts())
    assert "abc" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.parquet", None, "there is no file"),
        ("notes.doc", b"hello", "is neither parquet nor CSV"),
        ("empty.csv", b"", "cannot be read: Empty CSV file"),
        ("cut.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("latin.csv", b"id,card,shop,sum,at\n1,2,caf\xe9,1,2018-08-15\n", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RecurError, match=message) as error:
        list(TransactionFile(tmp_path / name, mapping(tmp_path)).parts())
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.csv"
        with path.open("w") as file:
            file.write("id,card,shop,sum,at\n")
            file.writelines(
                f"{n},{n % 999},{n % 99},1.5,2018-08-15 12:00:00\n" for n in range(rows)
            )
        tracemalloc.start()
        for _ in TransactionFile(path, mapping(tmp_path)).parts():
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(160_000) < 1.3 * peak(80_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[columns]\n", "missing required field `account_id`"),
        ("not TOML", "mapping.toml"),
        (MAPPING.format(columns='colour = "red"', time=""), "unknown field `colour`"),
        (MAPPING.format(columns='currency = "cur"', time=""), "keep one"),
        (MAPPING.format(columns="", time='zone = "Mars/Olympus"'), "no time zone known here"),
        (MAPPING.format(columns="", time='unit = "h"'), "Invalid enum value"),
        (MAPPING.format(columns="", time="").replace('currency = "EUR"', ""), "no currency"),
        (MAPPING.format(columns="", time="").replace('"EUR"', '"euro"'), "ISO 4217"),
    ],
)
def test_a_wrong_mapping_is_refused_with_the_key_that_is_wrong(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(text)
    with pytest.raises(RecurError) as error:
        load_mapping(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_shipped_mappings_are_found_by_name_and_the_example_is_one() -> None:
    assert load_mapping("handbook").columns.transaction_id == "TRANSACTION_ID"
    assert load_mapping("example").columns.account_id == "card"
    assert "recur replay FILE" in example_mapping()
    with pytest.raises(RecurError, match="or one of handbook"):
        load_mapping("nothing")


FURTHER = """
[fields]
numeric = ["age"]
categorical = { occupation = "job" }
"""


def test_further_fields_are_read_under_their_names_and_may_be_missing(tmp_path: Path) -> None:
    source = table(age=[31.5, None, 1e13], job=["nurse", "", None], id=["a", "b", "c"])
    (part,) = parts(source, tmp_path, columns=FURTHER)

    np.testing.assert_array_equal(part.numeric["age"], [31.5, np.nan, np.nan])
    assert part.categorical == {"occupation": ["nurse", None, None]}
    assert part.further() == {"age": [31.5, None, None], "occupation": ["nurse", None, None]}
    assert part.first(1).further() == {"age": [31.5], "occupation": ["nurse"]}


def test_the_fields_of_a_csv_file_are_text_or_numbers_as_the_mapping_says(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_text(
        "id,card,shop,sum,at,age,job\n1,2,3,1.0,2018-08-15,040,007\n1,2,3,1,2018-08-15,x,9\n"
    )
    lenient = TransactionFile(path, mapping(tmp_path, FURTHER), skip_unusable=True)
    (part,) = lenient.parts()

    assert part.further() == {"age": [40.0], "occupation": ["007"]}
    assert "row 2: age is not a number" in lenient.left_out.examples


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('numeric = ["amount"]', "amount under [fields] is there already"),
        ('numeric = ["amount_to_mean"]', "amount_to_mean under [fields] is there already"),
        ('numeric = ["age"]\ncategorical = ["age"]', "age under [fields] is there already"),
        ('categorical = ["a", "a"]', "a under [fields] is there already"),
        ('numeric = [""]', "cannot be a field's name"),
        ('categorical = { "a\\nb" = "job" }', "cannot be a field's name"),
        (f"numeric = {[f'n{i}' for i in range(65)]}", "65 columns under [fields]; at most 64"),
        ("number = []", "unknown field `number`"),
    ],
)
def test_further_fields_that_a_transaction_cannot_carry_are_refused(
    fields: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecurError) as error:
        mapping(tmp_path, f"[fields]\n{fields}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_of_a_further_field_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "has no column job (occupation)" in complaint(
        table(age=[1, 2, 3]), tmp_path, columns=FURTHER
    )


def test_training_needs_a_label_and_no_transaction_id_and_replay_the_reverse(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file.parquet"
    pq.write_table(table(fraud=[0, 1, None]).drop_columns("id"), path)
    text = MAPPING.format(columns='label = "fraud"', time="").replace('transaction_id = "id"', "")
    (tmp_path / "mapping.toml").write_text(text)
    labelled = load_mapping(tmp_path / "mapping.toml")

    (part,) = TransactionFile(path, labelled, for_training=True).parts()
    assert (len(part), part.transaction_ids) == (3, [])
    with pytest.raises(RecurError, match="names no transaction_id, which replay needs"):
        TransactionFile(path, labelled)
    with pytest.raises(RecurError, match="names no label, which training needs"):
        TransactionFile(path, mapping(tmp_path), for_training=True)


def test_training_takes_rows_in_any_order_and_repeats(tmp_path: Path) -> None:
    source = table(id=[1, 1, 1], at=table()["at"].to_pylist()[::-1], fraud=[0, 1, 0])
    path = tmp_path / "file.parquet"
    pq.write_table(source, path)
    (part,) = TransactionFile(path, mapping(tmp_path, 'label = "fraud"'), for_training=True).parts()
    assert part.transaction_ids == ["1", "1", "1"]
