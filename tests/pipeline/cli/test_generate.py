"""`recur generate` and `recur train-generator`: files, mappings, and answers to mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.errors import RecurError
from pipeline.files.column_mapping import load_mapping
from pipeline.files.generated import write_generated
from pipeline.files.generated_stream import open_stream
from pipeline.files.reader import TransactionFile
from pipeline.files.training_data import FileData
from tests.model.generator.small_generator import small_generator


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.fixture
def generator(tmp_path: Path) -> Path:
    path = tmp_path / "generator.safetensors"
    small_generator().save(path)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_generated_file_is_read_by_training_and_replay(
    tmp_path: Path, generator: Path, suffix: str
) -> None:
    output = tmp_path / f"x{suffix}"
    stream = open_stream(generator, {}, accounts=60, days=20, seed=1, start_date="2024-03-01")
    written = write_generated(stream, output, lambda count, share: None)
    mapping = load_mapping(tmp_path / f"x{suffix}.mapping.toml")

    log = FileData(output, mapping).write(tmp_path / "data", lambda share, note: None)
    rows = [len(part) for part in TransactionFile(output, mapping).parts()]
    assert len(log) == sum(rows) == written
    assert (log.unsorted, log.repeated) == (0, 0)
    assert set(log.numeric) == {"age"}
    assert set(log.categorical) == {"category", "channel"}
    assert log.timestamp_ms[0] >= 1_709_251_200_000


def test_ids_begin_with_a_mark_of_the_training_data(tmp_path: Path, generator: Path) -> None:
    output = tmp_path / "x.parquet"
    write_generated(
        open_stream(generator, {}, accounts=50, days=10, seed=1), output, lambda count, share: None
    )
    table = pq.read_table(output)
    mark = small_generator().header.id_mark

    for name in ("transaction_id", "account_id", "merchant_id"):
        assert all(text.startswith(f"{mark}-") for text in table[name].to_pylist())
    assert len(set(table["transaction_id"].to_pylist())) == table.num_rows


def test_an_interrupted_run_leaves_no_file(tmp_path: Path, generator: Path) -> None:
    def interrupt(count: int, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_generated(
            open_stream(generator, {}, accounts=50, days=10, seed=1),
            tmp_path / "x.parquet",
            interrupt,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["generator.safetensors"]


def test_mistakes_are_answered_in_a_line(tmp_path: Path, generator: Path, capsys: object) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "profile.toml").write_text("age = 3\n")
    (tmp_path / "text.toml").write_text('mean_amount = "much"\n')
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    few = "CUSTOMER_ID,TERMINAL_ID,TX_AMOUNT,TX_DATETIME,TX_FRAUD\n" + "\n".join(
        f"{n % 3},1,5.0,2024-01-{1 + n % 28:02d} 10:00:00,{n % 2}" for n in range(100)
    )
    (tmp_path / "few.csv").write_text(few + "\n")
    mapping = tmp_path / "mapping.toml"
    mapping.write_text(
        '[columns]\naccount_id = "CUSTOMER_ID"\nmerchant_id = "TERMINAL_ID"\n'
        'amount = "TX_AMOUNT"\ntimestamp = "TX_DATETIME"\nlabel = "TX_FRAUD"\n'
        '[constants]\ncurrency = "EUR"\n'
    )
    train: list[str | Path] = ["train-generator", tmp_path / "g", "--data"]
    cases: list[tuple[str, list[str | Path]]] = [
        ("must end with .parquet or .csv", ["generate", tmp_path / "x.txt"]),
        ("cannot write", ["generate", tmp_path / "file" / "x.csv"]),
        ("takes OUTPUT or --to-topic", ["generate"]),
        ("--rate belongs to --to-topic", ["generate", tmp_path / "x.csv", "--rate", "5"]),
        ("accounts is 0", ["generate", tmp_path / "x.csv", "--accounts", "0"]),
        ("such as 2024-01-31", ["generate", tmp_path / "x.csv", "--start-date", "soon"]),
        (
            "there is no 'age' in a profile",
            ["generate", tmp_path / "x.csv", "--profile", tmp_path / "profile.toml"],
        ),
        (
            "text.toml is no profile",
            ["generate", tmp_path / "x.csv", "--profile", tmp_path / "text.toml"],
        ),
        (
            "is not a generator",
            ["generate", tmp_path / "x.csv", "--like", tmp_path / "few.csv"],
        ),
        (
            "takes --data and --columns together",
            [*train, tmp_path / "data.csv"],
        ),
        (
            "has no column CUSTOMER_ID",
            [
                "train-generator",
                tmp_path / "g",
                "--data",
                tmp_path / "data.csv",
                "--columns",
                mapping,
            ],
        ),
        (
            "the data have 3 accounts",
            [
                "train-generator",
                tmp_path / "g",
                "--data",
                tmp_path / "few.csv",
                "--columns",
                mapping,
            ],
        ),
    ]
    for message, arguments in cases:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr().err  # type: ignore[attr-defined]
        assert stopped.value.code in (1, 2), message
        assert message in shown, shown
        assert "Traceback" not in shown
    assert not (tmp_path / "x.csv").exists()
    assert not (tmp_path / "g").exists()


def test_the_command_trains_and_generates(tmp_path: Path) -> None:
    trained = run(
        *("train-generator", tmp_path / "g.safetensors", "--customers", "100"),
        *("--terminals", "300", "--days", "30", "--epochs", "1"),
    )
    assert trained.returncode == 0, trained.stderr
    made = run(
        *("generate", tmp_path / "x.parquet", "--like", tmp_path / "g.safetensors"),
        *("--accounts", "30", "--days", "10"),
    )
    assert made.returncode == 0, made.stderr
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows > 100


def test_a_missing_generator_is_an_error_of_recur(tmp_path: Path) -> None:
    with pytest.raises(RecurError, match="cannot read the generator"):
        open_stream(tmp_path / "none", {}, accounts=1, days=1, seed=1)


def test_the_evaluation_writes_results_a_card_and_a_plot(tmp_path: Path) -> None:
    found = run(
        *("evaluate-generator", "--accounts", "100", "--customers", "230", "--terminals", "500"),
        *("--days", "30", "--epochs", "1", "--no-detector", "--output", tmp_path / "out"),
    )

    assert found.returncode == 0, found.stderr
    assert "copies of A" in found.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["card.md", "generator.safetensors", "histories.png", "results.json"]
    card = (tmp_path / "out" / "card.md").read_text()
    assert "| run of frauds |" in card
    assert "| by likelihood |" in card
