"""Generated histories keep every bound, and the seed alone decides them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model.generator.generator import Generator
from model.generator.settings import GeneratorError
from model.generator.stream import HistoryStream, Wish, generated_dataset
from model.units import DAY_MS
from tests.model.generator.small_generator import log_with_fields, small_generator

DIGEST = """
import hashlib, sys
from pathlib import Path
from model.generator.generator import Generator
from model.generator.stream import HistoryStream, Wish
digest = hashlib.sha256()
stream = HistoryStream(Generator.load(Path(sys.argv[1])), Wish(80, 20, seed=int(sys.argv[2])))
for part in stream.parts():
    for column in vars(part).values():
        digest.update(column.tobytes())
print(digest.hexdigest(), "torch" in sys.modules)
"""


def test_the_seed_decides_the_histories_in_every_process(tmp_path: Path) -> None:
    path = tmp_path / "generator.safetensors"
    small_generator().save(path)

    def digest_elsewhere(seed: int) -> list[str]:
        command = [sys.executable, "-c", DIGEST, str(path), str(seed)]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()

    digest = hashlib.sha256()
    for part in HistoryStream(Generator.load(path), Wish(80, 20, seed=3)).parts():
        for column in vars(part).values():
            digest.update(column.tobytes())
    assert digest_elsewhere(3) == [digest.hexdigest(), "False"]
    assert digest_elsewhere(4)[0] != digest.hexdigest()


def test_amounts_and_times_keep_their_bounds() -> None:
    generator = small_generator()
    log = generated_dataset(HistoryStream(generator, Wish(300, 60, seed=2)))

    begin = generator.header.start_ms
    assert (np.diff(log.timestamp_ms) >= 0).all()
    assert begin <= log.timestamp_ms[0]
    assert log.timestamp_ms[-1] < begin + 60 * DAY_MS
    assert np.isfinite(log.amount).all()
    assert (log.amount >= 0).all()
    assert np.abs(log.amount * 100 - np.round(log.amount * 100)).max() < 1e-6
    assert log.amount.max() <= 3 * log_with_fields().amount.max() * 10
    assert log.is_fraud.any()
    assert not log.is_fraud.all()


def test_fields_belong_to_whom_they_belonged_in_the_training_data() -> None:
    log = generated_dataset(HistoryStream(small_generator(), Wish(200, 40, seed=2)))

    for owner, values in (
        (log.merchant, log.categorical["category"]),
        (log.account, log.numeric["age"]),
    ):
        order = np.lexsort((values, owner))
        same = np.diff(owner[order]) == 0
        assert (np.diff(values[order])[same] == 0).all()
    assert set(np.unique(log.categorical["channel"])) == {0, 1}
    assert 0.15 < (log.categorical["channel"] == 1).mean() < 0.45


def test_a_given_profile_changes_what_it_names() -> None:
    generator = small_generator()

    def of(**given: float) -> tuple[float, float, float]:
        log = generated_dataset(HistoryStream(generator, Wish(100, 30, given=given)))
        return len(log) / 3000, float(np.median(log.amount)), float(log.is_fraud.mean())

    rate, amount, _ = of(payments_per_day=3, mean_amount=500)
    assert 1.5 < rate < 4.5
    assert rate > 2 * of(payments_per_day=0.5)[0]
    assert 300 < amount < 700
    assert of(defrauded=1)[2] > of(defrauded=0)[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"age": 3.0}, "there is no 'age' in a profile; its keys are hour, mean_amount"),
        ({"hour": 25.0}, "hour is 25.0; it must be 0 to 24"),
        ({"payments_per_day": -1.0}, "payments_per_day is -1.0; it must be 0.001 to 500"),
    ],
)
def test_a_wrong_profile_is_named(given: dict[str, float], message: str) -> None:
    with pytest.raises(GeneratorError, match=message):
        HistoryStream(small_generator(), Wish(10, 10, given=given))


@pytest.mark.parametrize(("accounts", "days"), [(0, 10), (10, 0), (10**9, 10), (10, 10**6)])
def test_a_wish_out_of_bounds_is_refused(accounts: int, days: int) -> None:
    with pytest.raises(GeneratorError, match="it must be 1 to"):
        Wish(accounts, days)


def test_no_profile_is_that_of_a_training_account() -> None:
    from model.generator.world import measure

    real = measure(log_with_fields(), 1).profiles
    drawn = small_generator().density.draw(1, np.arange(5000))
    closest = np.abs(drawn[:, None, :3] - real[None, :, :3]).max(2).min()
    assert closest > 0
