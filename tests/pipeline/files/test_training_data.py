"""`recur train --data`: a person's file becomes a checkpoint, or an error with advice."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from benchmarks.bursts import MAPPING as BURSTS_MAPPING
from benchmarks.bursts import transactions
from model.checkpoint import Checkpoint
from model.features.account import ACCOUNT_FEATURES
from model.features.spec import FEATURES
from model.metrics import average_precision
from model.training.preparation import write_raw_for
from model.training.sequences import Sequences, score_stepwise
from pipeline.cli.main import recur
from pipeline.errors import RecurError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.scenarios import ScenarioNumbers
from pipeline.files.training_data import FileData

MAPPING = """
[columns]
account_id = "card"
merchant_id = "shop"
amount = "sum"
timestamp = "at"
label = "fraud"
{columns}
[constants]
{constants}
"""
EURO = 'currency = "EUR"'
START = datetime(2020, 1, 1, tzinfo=UTC)

pytestmark = pytest.mark.usefixtures("one_torch_thread", "few_updates_of_merchant_weight")


def table(n: int = 2000, days: int = 40, **changes: Any) -> pa.Table:
    rng = np.random.default_rng(0)
    seconds = np.sort(rng.integers(0, days * 86_400, n))
    columns: dict[str, Any] = {
        "card": rng.integers(0, 30, n),
        "shop": [f"s{i}" for i in rng.integers(0, 12, n)],
        "sum": np.round(rng.gamma(2, 30, n), 2),
        "at": [START + timedelta(seconds=int(s)) for s in seconds],
        "fraud": (np.arange(n) % 25 == 0).astype(int),
    }
    return pa.table(columns | changes)


def written(
    directory: Path, source: pa.Table, columns: str = "", constants: str = EURO
) -> tuple[Path, Path]:
    file, mapping = directory / "file.parquet", directory / "mapping.toml"
    pq.write_table(source, file)
    mapping.write_text(MAPPING.format(columns=columns, constants=constants))
    return file, mapping


def run(directory: Path, source: pa.Table, *options: str, **mapping: str) -> Result:
    file, columns = written(directory, source, **mapping)
    arguments = ["train", str(directory / "out.safetensors"), "--data", str(file)]
    arguments += ["--columns", str(columns), "--hidden-size", "4", "--epochs", "1", *options]
    return CliRunner().invoke(recur, arguments)


def complaint(directory: Path, source: pa.Table, *options: str, **mapping: str) -> str:
    result = run(directory, source, *options, **mapping)
    assert isinstance(result.exception, RecurError), result.output
    assert "\n" not in str(result.exception)
    left = {path.name for path in directory.iterdir()}
    assert left <= {"file.parquet", "mapping.toml"}, left
    return str(result.exception)


@pytest.mark.slow
def test_a_file_with_fields_in_any_order_becomes_a_usable_checkpoint(
    tmp_path: Path,
) -> None:
    """Scores from the raw values of live transactions agree with the metrics of the training."""
    source = transactions(accounts=40, count=8_000, days=60, bursts=60)
    rng = np.random.default_rng(0)
    shuffled = source.take(rng.permutation(source.num_rows))
    file, mapping = tmp_path / "file.csv", tmp_path / "mapping.toml"
    pa_csv.write_csv(pa.concat_tables([shuffled, shuffled.slice(0, 7)]), file)
    mapping.write_text(BURSTS_MAPPING)

    result = CliRunner().invoke(
        recur,
        ["train", str(tmp_path / "out.safetensors"), "--data", str(file), "--columns",
         str(mapping), "--hidden-size", "16", "--epochs", "8"],
        catch_exceptions=False,
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert "7 rows were repeats: dropped" in result.stderr
    assert "were not in order of time: sorted" in result.stderr
    checkpoint = Checkpoint.load(tmp_path / "out.safetensors")
    header = checkpoint.header
    assert header.currency == "USD"
    assert [f.name for f in header.features.fields] == [
        "distance", "category",
    ]  # fmt: skip
    assert "they identify one of few accounts: lat, long, merch_lat" in result.stderr
    assert "customers" not in header.training
    assert header.metrics["average_precision"] > 0.5

    dataset = FileData(file, load_mapping(mapping)).write(tmp_path / "data", lambda d, n: None)
    assert dataset.digest() == header.data_digest
    sequences = Sequences(dataset.account)
    raw = write_raw_for(
        dataset, sequences, header.features, checkpoint.network.own, tmp_path / "raw"
    )
    in_order = np.empty_like(raw)
    in_order[sequences.row] = raw
    scores, _, _ = score_stepwise(
        checkpoint,
        dataset.account.astype(np.int64),
        np.asarray(dataset.amount),
        np.asarray(dataset.timestamp_ms),
        in_order[:, len(ACCOUNT_FEATURES) :],
    )
    held = len(dataset) - int(header.metrics["transactions"])
    assert average_precision(scores[held:], dataset.is_fraud[held:]) == pytest.approx(
        header.metrics["average_precision"], abs=0.01
    )
    assert raw.shape[1] == len(FEATURES) + 2


@pytest.mark.slow
def test_unknown_labels_are_excluded_from_every_count(tmp_path: Path) -> None:
    fraud = [None if i % 3 == 0 else i % 25 == 1 for i in range(2000)]
    result = run(tmp_path, table(fraud=fraud))
    assert result.exit_code == 0, result.output
    header = Checkpoint.load(tmp_path / "out.safetensors").header
    file = FileData(tmp_path / "file.parquet", load_mapping(tmp_path / "mapping.toml"))
    dataset = file.write(tmp_path / "data", lambda done, note: None)
    assert dataset.is_labelled.mean() == pytest.approx(2 / 3, abs=0.01)
    held = dataset.day >= 33
    assert header.metrics["transactions"] == dataset.is_labelled[held].sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraud": [0] * 2000}, "all labels say legitimate: both classes are needed"),
        ({"fraud": [1] * 2000}, "all labels say fraud: both classes are needed"),
        ({"fraud": [None] * 2000}, "no transaction has a label"),
        ({"fraud": [1] * 5 + [0] * 1995}, "the training days 3 to 27 have 0 frauds"),
        ({"fraud": ["perhaps"] * 2000}, "row 1: label must be 1, 0, true"),
        ({"sum": [1.0] * 1999 + [float("nan")]}, "row 2,000: amount is missing or not finite"),
        ({"at": [START] * 2000}, "the data span 1 days; training needs 8 or more"),
        ({"shop": [1.5] * 2000}, "merchant_id: its column holds double; ids must be text"),
    ],
)
def test_data_without_a_possible_training_give_an_error_with_advice(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in complaint(tmp_path, table(**changes))


def test_an_empty_file_a_missing_column_and_several_currencies_are_errors(tmp_path: Path) -> None:
    assert "has no usable rows" in complaint(tmp_path, table().slice(0, 0))
    assert "has no column fraud (label); its columns are" in complaint(
        tmp_path, table().drop_columns("fraud")
    )
    currencies = ["EUR"] * 1990 + ["USD"] * 10
    error = complaint(tmp_path, table(cur=currencies), columns='currency = "cur"', constants="")
    assert "amounts in several currencies (1,990 in EUR, 10 in USD so far)" in error
    assert "convert the others" in error


def test_a_mapping_without_a_label_and_wrong_options_are_rejected(
    tmp_path: Path,
) -> None:
    file, mapping = written(tmp_path, table())
    mapping.write_text(mapping.read_text().replace('label = "fraud"', ""))
    out = str(tmp_path / "out.safetensors")
    result = CliRunner().invoke(
        recur, ["train", out, "--data", str(file), "--columns", str(mapping)]
    )
    assert "has no label, which training needs" in str(result.exception)
    result = CliRunner().invoke(recur, ["train", out, "--data", str(file)])
    assert "takes --data and --columns together" in str(result.exception)
    error = complaint(tmp_path, table(), "--train-until", "2020-03-30")
    assert "leaves no room for each of training, validation and test" in error
    assert "train_until is 'soon'" in complaint(tmp_path, table(), "--train-until", "soon")


@pytest.mark.slow
def test_unusable_rows_are_skipped_on_request(tmp_path: Path) -> None:
    result = run(tmp_path, table(sum=[-1.0, *[1.0] * 1999]), "--skip-unusable")
    assert result.exit_code == 0, result.output
    assert "1 skipped, such as row 1: amount is negative" in result.stderr


def test_the_identity_of_a_file_changes_with_the_file_and_its_mapping(tmp_path: Path) -> None:
    file, mapping = written(tmp_path, table())
    identities = {FileData(file, load_mapping(mapping)).identity()}
    mapping.write_text(mapping.read_text() + '\n[prefixes]\naccount_id = "A"')
    identities.add(FileData(file, load_mapping(mapping)).identity())
    pq.write_table(table(1999), file)
    identities.add(FileData(file, load_mapping(mapping)).identity())
    assert len(identities) == 3


def test_kinds_of_fraud_are_numbered(tmp_path: Path) -> None:
    kinds = ["none" if i % 2 else "stolen" for i in range(2000)]
    file, mapping = written(tmp_path, table(kind=kinds), columns='scenario = "kind"')
    dataset = FileData(file, load_mapping(mapping)).write(tmp_path / "d", lambda done, note: None)
    assert set(dataset.scenario.tolist()) == {1, 2}
    file, mapping = written(
        tmp_path, table(kind=[str(i) for i in range(2000)]), columns='scenario = "kind"'
    )
    with pytest.raises(RecurError, match="more than 100 values"):
        FileData(file, load_mapping(mapping)).write(tmp_path / "e", lambda done, note: None)


def test_whole_and_other_names_of_scenarios_never_share_a_number() -> None:
    numbers = ScenarioNumbers()

    assert [numbers.number_of(name) for name in ("stolen", "1", "2", "", None, "1")] == [
        1, 2, 3, 0, 0, 2,
    ]  # fmt: skip
    assert numbers.names == {1: "stolen", 2: "1", 3: "2"}
