"""The data set on disk: transactions in order of time, without repeats, in little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.dataset import (
    MISSING,
    TEXTS_MAX,
    Dataset,
    DatasetError,
    DatasetWriter,
    Rows,
    text_keys,
)
from model.features.account import ACCOUNT_FEATURES, observe_log
from model.features.spec import FEATURES, Encoder, FeatureSpec, Field, field_column
from model.training import feature_table as raw_features
from model.training.feature_table import EncodedInputs, open_raw, restarted_inputs, write_raw
from model.training.inputs import CONSTANT, OF_ACCOUNT, chosen_fields, embedding_sizes, fitted_spec
from model.training.sequences import Sequences
from model.training.settings import TrainingSettings
from model.training.source import SimulatedData
from tests.fakes.datasets import simulated_dataset
from tests.model.simulated_log import observe_all, simulate


def rows(n: int, seed: int = 0, **changes: Any) -> Rows:
    """Draw N transactions in order of time, of 7 accounts and 5 merchants."""
    rng = np.random.default_rng(seed)
    accounts, merchants = (text_keys([f"{of}{i}" for i in range(9)]) for of in "am")
    columns: dict[str, Any] = {
        "account": accounts[rng.integers(0, 7, n)],
        "merchant": merchants[rng.integers(0, 5, n)],
        "amount": rng.gamma(2, 30, n),
        "timestamp_ms": np.sort(rng.integers(0, 10**9, n)),
        "label": rng.integers(-1, 2, n).astype(np.int8),
        "scenario": np.zeros(n, np.int8),
    }
    return Rows(**(columns | changes))


def written(folder: Path, *parts: Rows, **fields: Any) -> Dataset:
    with DatasetWriter(folder / "data", **fields) as writer:
        for part in parts:
            writer.append(part)
        return writer.finish("EUR")


def test_rows_written_in_parts_are_read_back(tmp_path: Path) -> None:
    first, second = rows(50), rows(30, 1, timestamp_ms=np.arange(30) + 2 * 10**9)
    dataset = written(tmp_path, first, second)

    assert len(dataset) == 80
    np.testing.assert_array_equal(dataset.amount, np.append(first.amount, second.amount))
    same_account = np.append(first.account, second.account)
    for code in range(7):
        assert len(set(same_account[dataset.account == code].tolist())) == 1
    assert (dataset.unsorted, dataset.repeated, dataset.currency) == (0, 0, "EUR")
    again = Dataset.open(tmp_path / "data")
    assert again.digest() == dataset.digest()
    assert [dict(again.columns())[name].dtype for name, _ in dataset.columns()] == [
        column.dtype for _, column in dataset.columns()
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_any_order_of_rows_with_repeats_gives_the_same_dataset(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    given_rows = rows(n, seed, timestamp_ms=np.sort(rng.permutation(1000)[:n]))
    shuffled = np.append(rng.permutation(n), rng.integers(0, n, 5))  # five of them twice

    def picked(order: Any) -> Rows:
        names = ("account", "merchant", "amount", "timestamp_ms", "label", "scenario")
        return Rows(**{name: getattr(given_rows, name)[order] for name in names})

    in_order = written(tmp_path_factory.mktemp("a"), given_rows)
    sorted_by_us = written(tmp_path_factory.mktemp("b"), picked(shuffled))

    assert sorted_by_us.repeated == 5
    assert sorted_by_us.digest() == in_order.digest()


def test_rows_of_the_same_time_keep_their_order_and_unsorted_ones_are_counted(
    tmp_path: Path,
) -> None:
    times = np.array([5, 3, 3, 9, 3])
    dataset = written(
        tmp_path, rows(5, timestamp_ms=times, amount=np.arange(5.0), key=np.arange(5, dtype="u8"))
    )
    assert dataset.amount.tolist() == [1.0, 2.0, 4.0, 0.0, 3.0]
    assert dataset.unsorted == 2


def test_a_repeated_transaction_id_keeps_its_first_row(tmp_path: Path) -> None:
    keys = np.array([7, 8, 7, 9, 8], np.uint64)
    dataset = written(tmp_path, rows(5, key=keys, amount=np.arange(5.0)))
    assert (dataset.amount.tolist(), dataset.repeated) == ([0.0, 1.0, 3.0], 2)


def test_texts_become_codes_and_missing_too_long_or_too_many_ones_do_not(tmp_path: Path) -> None:
    texts = ["food", None, "fuel", "x" * 65, "food"]
    dataset = written(tmp_path, rows(5, categorical={"mcc": texts}), categorical=("mcc",))
    codes = dataset.categorical["mcc"].tolist()
    assert codes[1] == codes[3] == MISSING
    assert [dataset.texts["mcc"][codes[i]] for i in (0, 2, 4)] == ["food", "fuel", "food"]

    many: list[str | None] = [str(i) for i in range(TEXTS_MAX + 10)]
    dataset = written(
        tmp_path / "many",
        rows(len(many), categorical={"id": many}),
        categorical=("id",),
    )
    assert (dataset.categorical["id"] == MISSING).sum() == 10


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), DatasetWriter(tmp_path / "data", numeric=("age",)) as writer:
        writer.append(rows(5))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DatasetError, match="no transactions"):
        written(tmp_path)
    with pytest.raises(DatasetError, match="holds no whole dataset"):
        Dataset.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot write in"):
        DatasetWriter(tmp_path / "file" / "data")


def test_writing_takes_little_memory_for_each_transaction(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        tracemalloc.start()
        with DatasetWriter(tmp_path / str(n)) as writer:
            for part in range(n // 10_000):
                times = np.arange(10_000) + part * 10_000
                writer.append(rows(10_000, part, timestamp_ms=times))
            writer.finish("EUR")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(160_000) - peak(80_000) < 80_000 * 80


def test_simulated_days_are_a_dataset(tmp_path: Path) -> None:
    settings = TrainingSettings(customers=60, terminals=300, days=20)
    dataset = SimulatedData(settings).write(tmp_path / "data", lambda done, note: None)
    log = simulate(settings)
    np.testing.assert_array_equal(dataset.is_fraud, log.is_fraud)
    np.testing.assert_array_equal(dataset.day, log.day - log.day[0])
    np.testing.assert_array_equal(np.unique(log.account)[dataset.account], log.account)
    assert dataset.is_labelled.all()


@pytest.mark.parametrize("group", [500, 10**6])
def test_raw_features_of_groups_are_those_of_the_whole_log(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_features, "GROUP_TRANSACTIONS", group)
    settings = TrainingSettings(customers=60, terminals=300, days=40)
    dataset = SimulatedData(settings).write(tmp_path / "data", lambda done, note: None)
    sequences = Sequences(dataset.account)
    spec = FeatureSpec(label_delay_days=3.0)
    shares: list[float] = []

    raw = write_raw(dataset, sequences, spec, tmp_path / "raw", show=shares.append)

    np.testing.assert_array_equal(raw, observe_all(simulate(settings), spec)[sequences.row])
    np.testing.assert_array_equal(raw, open_raw(tmp_path / "raw", dataset, spec))
    assert (raw[:, FEATURES.index("merchant_known_frauds")] > 0).any()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def fields_of(tmp_path: Path, n: int = 4000) -> Dataset:
    rng = np.random.default_rng(0)
    numeric = {
        "age": np.where(rng.random(n) < 0.1, np.nan, rng.normal(40, 10, n)),
        "constant": np.full(n, 3.0),
        "tiny": rng.normal(5e-7, 1e-8, n),
        "heavy": np.exp(rng.normal(0, 6, n)),
        "wild": rng.standard_cauchy(n) ** 3,
        "huge": np.where(np.arange(n) == 7, 1e12, 1.0),
        "empty": np.full(n, np.nan),
    }
    job: list[str | None] = rng.choice(["nurse", "cook", "pilot"], n).tolist()
    job[:100] = [None] * 100
    job[100:105] = ["astronaut"] * 5
    categorical: dict[str, list[str | None]] = {"job": job, "always": ["x"] * n}
    return written(
        tmp_path,
        rows(n, numeric=numeric, categorical=categorical),
        numeric=tuple(numeric),
        categorical=tuple(categorical),
    )


def test_informative_fields_are_chosen_with_their_frequent_texts(
    tmp_path: Path,
) -> None:
    dataset = fields_of(tmp_path)
    fields, left_out = chosen_fields(dataset, np.arange(len(dataset)))
    assert left_out == dict.fromkeys(("constant", "empty", "always"), CONSTANT)
    assert [f.name for f in fields] == ["age", "tiny", "heavy", "wild", "huge", "job"]
    assert set(fields[-1].vocabulary) == {"nurse", "cook", "pilot"}  # there are few astronauts


def test_fields_that_identify_few_accounts_are_left_out(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    n, accounts = 3000, 100
    account = rng.integers(0, accounts, n)
    home = rng.uniform(-60, 60, accounts)[account]
    categorical: dict[str, list[str | None]] = {
        "street": [f"street {a}" for a in account],
        "gender": ["fm"[a % 2] for a in account],
        "mcc": [str(m) for m in rng.integers(0, 50, n)],
    }
    numeric = {"home": home, "shop": home + rng.normal(0, 1, n), "distance": rng.random(n)}
    given_rows = rows(
        n, account=account.astype(np.uint64), numeric=numeric, categorical=categorical
    )
    dataset = written(tmp_path, given_rows, numeric=tuple(numeric), categorical=tuple(categorical))
    fields, left_out = chosen_fields(dataset, np.arange(n))
    assert left_out == dict.fromkeys(("home", "shop", "street"), OF_ACCOUNT)
    assert [field.name for field in fields] == ["distance", "gender", "mcc"]


def test_inputs_of_fields_are_standardised_whatever_their_scale(tmp_path: Path) -> None:
    dataset = fields_of(tmp_path)
    fields, _ = chosen_fields(dataset, np.arange(len(dataset)))
    sequences = Sequences(dataset.account)
    raw = write_raw(dataset, sequences, FeatureSpec(fields=fields), tmp_path / "raw")
    age = raw[:, len(FEATURES)]
    is_fraud = np.nan_to_num(age) > 55
    spec = fitted_spec(raw, is_fraud, fields)
    inputs = Encoder(spec).encode(raw)

    assert np.isfinite(inputs).all()
    by_name: dict[tuple[str, str], Any] = {}
    for column, i in enumerate(spec.inputs):
        by_name[i.feature, i.transform] = inputs[:, column]
    for name, transform in (("age", "linear"), ("tiny", "linear"), ("heavy", "log1p")):
        assert 0.5 < by_name[name, transform].std() < 2
        assert abs(by_name[name, transform].mean()) < 0.3
    assert ("wild", "linear") not in by_name
    assert ("wild", "step") in by_name
    assert by_name["age", "is_missing"].sum() == np.isnan(age).sum()
    assert np.abs(inputs[:, len(spec.inputs) - 1]).max() == 3  # the codes of job
    steps = [i.threshold for i in spec.inputs if (i.feature, i.transform) == ("age", "step")]
    assert min(abs(step - 55) for step in steps) < 0.2
    assert embedding_sizes(spec) == ((4, 4),)
    assert spec.inputs[-1].feature == "job"


def test_a_field_is_the_same_number_in_training_and_in_the_worker(tmp_path: Path) -> None:
    values: list[float | None] = [1.5, None, 3.1, -2.0]
    texts: list[str | None] = ["b", None, "a", "c"]
    dataset = written(
        tmp_path,
        rows(
            4,
            numeric={"n": np.array([np.nan if v is None else v for v in values])},
            categorical={"c": texts},
        ),
        numeric=("n",),
        categorical=("c",),
    )
    fields = (Field("n", "numeric"), Field("c", "categorical", ("a", "b")))
    sequences = Sequences(dataset.account)
    raw = write_raw(dataset, sequences, FeatureSpec(fields=fields), tmp_path / "raw")
    live_values: list[list[Any]] = [values, texts]
    for column, field in enumerate(fields, start=len(FEATURES)):
        live = field_column(field)(live_values[column - len(FEATURES)])
        np.testing.assert_array_equal(raw[:, column], live[sequences.row])


def test_inputs_are_encoded_at_each_access(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).random((30, len(FEATURES))).astype(np.float32)
    spec = FeatureSpec().fitted(raw)
    position = np.array([[3, 4, 5], [0, 1, 2]])
    given_inputs = EncodedInputs(raw, spec, torch.device("cpu")).at(position)
    assert given_inputs.shape == (2, 3, len(spec.inputs))
    np.testing.assert_array_equal(given_inputs[1].numpy(), Encoder(spec).encode(raw[:3]))


def test_a_restarted_account_has_no_history_and_its_merchants_are_unchanged(
    tmp_path: Path,
) -> None:
    dataset = simulated_dataset(customers=60, terminals=300, days=20)
    sequences = Sequences(dataset.account)
    until_row = len(dataset) * 3 // 4
    raw = write_raw(dataset, sequences, FeatureSpec(), tmp_path / "raw")
    whole = EncodedInputs(raw, FeatureSpec().fitted(raw), torch.device("cpu"))
    restarted, parts = restarted_inputs(
        dataset, sequences, whole, until_row, tmp_path / "restarted", 1
    )

    account = np.empty(len(dataset), np.int64)
    for number, (start, length) in enumerate(zip(parts.start, parts.length, strict=True)):
        account[parts.row[start : start + length]] = number
    assert (account // 2 == np.unique(dataset.account, return_inverse=True)[1]).all()
    last_ones = (parts.start + parts.length - 1)[::2][parts.length[::2] > 0]
    assert len(last_ones) > 20
    assert (parts.row[last_ones] < until_row).all(), "states are lost before this row"

    expected = raw.copy()
    expected[:, : len(ACCOUNT_FEATURES)] = observe_log(
        account[parts.row],
        dataset.amount[parts.row],
        dataset.timestamp_ms[parts.row],
        FeatureSpec().scale,
    )
    encoded = Encoder(FeatureSpec().fitted(raw)).encode(expected)
    everywhere = np.arange(len(dataset))
    np.testing.assert_array_equal(restarted.at(everywhere).numpy(), encoded)
    assert not np.array_equal(whole.at(everywhere).numpy(), encoded)


def test_sequences_before_a_row_leave_out_what_comes_after() -> None:
    account = np.array([0, 1, 0, 1, 1, 0, 2])
    sequences = Sequences(account)
    for row in range(len(account) + 1):
        length = sequences.before(row).length
        assert length.tolist() == [(account[:row] == a).sum() for a in range(3)]
        parts = sequences.restarted(length, seed=row)
        assert parts.length.reshape(3, 2).sum(1).tolist() == sequences.length.tolist()
        assert (parts.length[::2] <= length).all()
        before = parts.before(row).length
        assert before.reshape(3, 2).sum(1).tolist() == length.tolist()


def test_the_identity_of_simulated_data_depends_on_their_settings() -> None:
    one, other, handbook = (
        SimulatedData(settings).identity()
        for settings in (
            TrainingSettings(customers=10),
            TrainingSettings(customers=11),
            TrainingSettings(customers=10, world="handbook"),
        )
    )
    assert len({one, other, handbook}) == 3
