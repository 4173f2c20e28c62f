"""``recur label``: what is sent is what the file or the person says, or nothing is sent."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from click.testing import CliRunner

from pipeline.cli.main import recur
from pipeline.errors import RecurError, SettingsError
from pipeline.files.column_mapping import LabelColumns, LabelMapping, TimeForm, load_label_mapping
from pipeline.files.reader import LabelFile, LabelPart
from pipeline.kafka.topics import ensure_topics
from pipeline.local.services import Kafka
from pipeline.messages.labels import Label, decode_label
from pipeline.replay.labels import LabelOptions, run_label, single_label
from pipeline.settings import Settings, load_settings

DAY_MS = 86_400_000

LABELS_CSV = """transaction_id,account_id,merchant_id,label,timestamp,labelled_at
t1,A1,M1,fraud,2024-05-01T10:00:00Z,2024-05-08T10:00:00Z
t2,A2,M2,legitimate,2024-05-01T11:00:00Z,2024-05-02T11:00:00Z
t3,A1,M1,1,2024-05-01T12:00:00Z,2024-05-08T12:00:00Z
"""


@pytest.fixture
def settings(kafka: Kafka) -> Settings:
    return load_settings(
        kafka_bootstrap_servers=kafka.bootstrap,
        topic_prefix=f"{uuid.uuid4().hex[:8]}-",
        topic_partitions=2,
    )


def sent(settings: Settings) -> list[tuple[Label, int, int]]:
    """What is in the labels topic, each decoded as a worker does."""

    async def read() -> list[Any]:
        partitions = (await ensure_topics(settings))["labels"]
        async with AIOKafkaConsumer(
            **settings.kafka_client_options(), auto_offset_reset="earliest"
        ) as consumer:
            places = [TopicPartition(settings.topic("labels"), p) for p in range(partitions)]
            consumer.assign(places)
            ends = await consumer.end_offsets(places)
            found = []
            while any([await consumer.position(p) < ends[p] for p in places]):
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    found += records
        return found

    labels = [decode_label(record.key, record.value) for record in asyncio.run(read())]
    return sorted(labels, key=lambda label: label[0].transaction_id)


def test_a_file_of_labels_is_sent_as_it_stands(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(LABELS_CSV)

    assert run_label(LabelOptions(file=file), settings) == 0

    found = sent(settings)
    assert [(x.transaction_id, x.account_id, x.merchant_id, x.label) for x, _, _ in found] == [
        ("t1", "A1", "M1", "fraud"),
        ("t2", "A2", "M2", "legitimate"),
        ("t3", "A1", "M1", "fraud"),
    ]
    assert [(late - then) // DAY_MS for _, then, late in found] == [7, 1, 7]
    assert "sent 3 labels, 2 of them fraud" in capsys.readouterr().out


def test_a_date_in_a_file_on_the_day_of_the_payment_is_not_before_it(tmp_path: Path) -> None:
    """In the mapping's time zone, of a column of texts."""
    file, mapping = tmp_path / "labels.csv", tmp_path / "columns.toml"
    rows = ["t1,A1,M1,fraud,2024-05-01 23:30:00,2024-05-01", "t2,A1,M1,fraud,2024-05-01 10:00:00,"]
    file.write_text("\n".join([LABELS_CSV.splitlines()[0], *rows]) + "2024-05-02\n")
    mapping.write_text('[time]\nzone = "Europe/Berlin"\n')

    (part,) = LabelFile(file, load_label_mapping(mapping)).parts()

    assert (part.labelled_ms - part.timestamps_ms).tolist() == [0, 14 * 3_600_000]


def test_columns_of_other_names_are_mapped(settings: Settings, tmp_path: Path) -> None:
    file, mapping = tmp_path / "labels.csv", tmp_path / "columns.toml"
    file.write_text("id,card,shop,truth,at,known\n1,2,3,true,1714557600,1715162400\n")
    mapping.write_text(
        '[columns]\ntransaction_id = "id"\naccount_id = "card"\nmerchant_id = "shop"\n'
        'label = "truth"\ntimestamp = "at"\nlabelled_at = "known"\n'
        '[prefixes]\nmerchant_id = "T"\n[time]\nunit = "s"\n'
    )

    run_label(LabelOptions(file=file, columns=mapping), settings)

    ((label, then, late),) = sent(settings)
    assert (label.merchant_id, label.label) == ("T3", "fraud")
    assert (then, late - then) == (1_714_557_600_000, 7 * DAY_MS)


def parts_of(tmp_path: Path, text: str, mapping: LabelMapping | None = None) -> LabelPart:
    """A file's labels, read and not sent."""
    file = tmp_path / "labels.csv"
    file.write_text(text)
    (part,) = LabelFile(file, mapping or LabelMapping()).parts()
    return part


def test_a_file_may_tell_how_far_merchants_explain_frauds(tmp_path: Path) -> None:
    lines = LABELS_CSV.splitlines()
    texts = ("merchant_weight", "0.25", "", "1")
    text = "\n".join(f"{line},{weight}" for line, weight in zip(lines, texts, strict=True))

    assert parts_of(tmp_path, LABELS_CSV).merchant_weights is None
    assert parts_of(tmp_path, text).merchant_weights == [0.25, None, 1.0]
    with pytest.raises(RecurError, match=r"row 3: merchant_weight is not between 0 and 1"):
        parts_of(tmp_path, text.removesuffix("1") + "1.5")
    mapping = LabelMapping(LabelColumns(merchant_weight="share"))
    with pytest.raises(RecurError, match="has no column share"):
        parts_of(tmp_path, text, mapping)


def test_a_date_in_a_file_is_not_before_the_payment_of_that_day(tmp_path: Path) -> None:
    header = LABELS_CSV.splitlines()[0]
    mapping = LabelMapping(time=TimeForm(zone="Europe/Madrid"))
    text = f"{header}\nt1,A1,M1,fraud,2024-05-01T18:00:00,2024-05-01\n"

    part = parts_of(tmp_path, text, mapping)

    assert part.labelled_ms.tolist() == part.timestamps_ms.tolist()
    with pytest.raises(RecurError, match="labelled_at is before the transaction's timestamp"):
        parts_of(tmp_path, text.replace(",2024-05-01\n", ",2024-04-30\n"), mapping)


HANDBOOK_COLUMNS = (
    "TRANSACTION_ID,CUSTOMER_ID,TERMINAL_ID,TX_AMOUNT,TX_DATETIME,TX_FRAUD,TX_FRAUD_SCENARIO"
)
HANDBOOK_CSV = f"""{HANDBOOK_COLUMNS}
1,7,3,20.5,2018-05-01 10:00:00,0,0
2,8,3,250.0,2018-05-01 11:00:00,1,1
3,7,4,30.0,2018-05-01 12:00:00,1,2
"""


@pytest.mark.parametrize(("legitimate", "expected"), [(False, ["2", "3"]), (True, ["1", "2", "3"])])
def test_labels_are_made_of_a_file_of_transactions(
    settings: Settings, tmp_path: Path, legitimate: bool, expected: list[str]
) -> None:
    file = tmp_path / "transactions.csv"
    file.write_text(HANDBOOK_CSV)

    run_label(
        LabelOptions(file=file, from_transactions="handbook", delay_days=7, legitimate=legitimate),
        settings,
    )

    found = sent(settings)
    assert [label.transaction_id for label, _, _ in found] == expected
    for label, then, late in found:
        assert label.label == ("legitimate" if label.transaction_id == "1" else "fraud")
        assert label.merchant_id in ("T3", "T4")
        assert label.account_id in ("C7", "C8")
        assert late - then == 7 * DAY_MS


def test_a_single_label_is_spelled_out_on_the_command_line(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECUR_KAFKA_BOOTSTRAP_SERVERS", settings.kafka_bootstrap_servers)
    monkeypatch.setenv("RECUR_TOPIC_PREFIX", settings.topic_prefix)
    result = CliRunner().invoke(
        recur,
        "label --transaction-id t1 --account-id A1 --merchant-id M1 --label fraud"
        " --timestamp 2024-05-01T10:00:00+02:00 --labelled-at 1715162400000".split(),
    )

    assert result.exit_code == 0, result.output
    ((label, then, late),) = sent(settings)
    assert (label.label, label.source) == ("fraud", "hand")
    assert (then, late) == (1_714_550_400_000, 1_715_162_400_000)


SINGLE: dict[str, Any] = {
    "transaction_id": "t1",
    "account_id": "A1",
    "merchant_id": "M1",
    "label": "fraud",
    "timestamp": "2024-05-01T10:00:00Z",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "--label is missing"),
        ({"file": Path("labels.csv")}, "exclude each other"),
        ({"timestamp": "yesterday"}, "--timestamp is no time"),
        ({"timestamp": "2024-05-01T10:00:00"}, "--timestamp is no time"),
        ({"labelled_at": "2024-04-01T10:00:00Z"}, "before the transaction"),
        ({"labelled_at": "2024-04-30"}, "before the transaction"),
        ({"timestamp": "1714557600"}, "--timestamp looks like seconds"),
        ({"merchant_id": "x" * 257}, "--merchant-id"),
        ({"delay_days": -1.0}, "--delay-days"),
        ({"columns": Path("a"), "from_transactions": "handbook"}, "keep one"),
    ],
)
def test_what_is_missing_or_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        single_label(LabelOptions(**(SINGLE | changes)))


def test_a_single_label_may_have_a_date_on_the_day_of_the_payment() -> None:
    label = single_label(LabelOptions(**(SINGLE | {"labelled_at": "2024-05-01"})))
    assert label.labelled_at == label.timestamp == 1_714_557_600_000


def test_without_file_and_options_it_says_what_it_needs() -> None:
    with pytest.raises(SettingsError, match="needs FILE, or for a single label"):
        LabelOptions()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("t4,A1,M1,maybe,2024-05-01T12:00:00Z,2024-05-08T12:00:00Z", "row 4: label is none of"),
        ("t4,A1,M1,,2024-05-01T12:00:00Z,2024-05-08T12:00:00Z", "row 4: label is empty"),
        ("t4,A1,M1,1,2024-05-01T12:00:00Z,soon", "row 4: labelled_at is not"),
        ("t4,A1,M1,1,2024-05-01T12:00:00Z,2024-04-08T12:00:00Z", "row 4: labelled_at is before"),
        ("t4,A1,M1,1,2024-05-01T12:00:00Z,2024-04-30", "row 4: labelled_at is before"),
        ("t4,A1,M1,1,1970-01-20T12:00:00Z,2024-04-30", "row 4: timestamp is in 1970"),
        ("t4,A1,,1,2024-05-01T12:00:00Z,2024-05-08T12:00:00Z", "row 4: merchant_id is empty"),
    ],
)
def test_a_row_that_is_no_label_is_named(
    settings: Settings, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(LABELS_CSV + line + "\n")

    with pytest.raises(RecurError, match=message):
        run_label(LabelOptions(file=file), settings)


def test_a_file_without_the_columns_says_which(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("transaction_id,account_id,merchant_id,label,timestamp\n")

    with pytest.raises(RecurError, match="has no column labelled_at"):
        run_label(LabelOptions(file=file), settings)


def test_transactions_without_the_truth_make_no_labels(tmp_path: Path, settings: Settings) -> None:
    file, mapping = tmp_path / "transactions.csv", tmp_path / "columns.toml"
    file.write_text("id,card,shop,amount,time\n")
    mapping.write_text(
        '[columns]\ntransaction_id = "id"\naccount_id = "card"\nmerchant_id = "shop"\n'
        'amount = "amount"\ntimestamp = "time"\n[constants]\ncurrency = "EUR"\n'
    )

    with pytest.raises(SettingsError, match="names no label"):
        run_label(LabelOptions(file=file, from_transactions=str(mapping)), settings)
