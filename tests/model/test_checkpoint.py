"""Checkpoint files: they survive a round trip, and all other files are rejected."""

from __future__ import annotations

import json
import os
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

import model
import pipeline
from model.architecture import Architecture
from model.checkpoint import (
    FILE_MAX_BYTES,
    HEADER_MAX_BYTES,
    MESSAGE_MAX,
    Checkpoint,
    CheckpointError,
    CheckpointThresholds,
    Header,
)
from model.features.spec import FEATURES, FeatureSpec, Input
from model.forecast.shape import ForecastShape
from model.network import Network
from tests.fakes.forecasts import with_random_forecast


def checkpoint(seed: int = 0, layers: int = 1, mean: float = 0.0) -> Checkpoint:
    torch.manual_seed(seed)
    spec = FeatureSpec((Input("amount", "log1p", mean=mean), Input("amount_to_mean", "linear")))
    architecture = Architecture(
        2, input_size=4, hidden_size=8, layers=layers, head_size=4, roles=spec.roles
    )
    return Checkpoint.of(
        Network(architecture),
        Header(architecture=architecture, features=spec, metrics={"average_precision": 0.3}),
    )


def rewritten(path: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """Change the JSON header of a checkpoint by hand."""
    content = path.read_bytes()
    weights = safetensors.torch.load(content)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["recur"])
    change(header)
    safetensors.torch.save_file(weights, path, {"recur": json.dumps(header)})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "model.safetensors"
    checkpoint().save(path)
    return path


@pytest.mark.parametrize("layers", [1, 3])
def test_a_checkpoint_survives_its_file(tmp_path: Path, layers: int) -> None:
    saved = checkpoint(layers=layers)
    saved.save(tmp_path / "model.safetensors")
    loaded = Checkpoint.load(tmp_path / "model.safetensors")
    assert loaded.digest == saved.digest
    assert loaded.header == saved.header
    raw = np.random.default_rng(0).uniform(0, 9, (5, len(FEATURES))).astype(np.float32)
    inputs, hidden = loaded.encode(raw), loaded.stepper.empty_hidden(5)
    mine, its = saved.stepper.step(inputs, hidden), loaded.stepper.step(inputs, hidden)
    assert [part.tobytes() for part in mine] == [part.tobytes() for part in its]
    assert not loaded.network.training


def test_the_same_checkpoint_gives_the_same_bytes_and_leaves_no_partial_file(
    tmp_path: Path,
) -> None:
    checkpoint().save(tmp_path / "a")
    checkpoint().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_digest_follows_weights_features_and_architecture_but_not_thresholds() -> None:
    first = checkpoint()
    assert len(first.digest) == 12
    assert int(first.digest, 16) >= 0
    same = first.with_header(thresholds=CheckpointThresholds(0.2, 0.3), metrics={})
    assert same.digest == first.digest
    others = [checkpoint(seed=1), checkpoint(layers=2), checkpoint(mean=0.5)]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def test_a_forecast_head_changes_no_digest_and_survives_its_file(tmp_path: Path) -> None:
    plain = checkpoint()
    found = with_random_forecast(plain)
    found.save(tmp_path / "m")
    loaded = Checkpoint.load(tmp_path / "m")
    assert plain.forecaster is None
    assert loaded.forecaster is not None
    assert loaded.digest == plain.digest, "states in Redis belong to the same model"
    assert loaded.header == found.header
    for name, weight in found.forecast_weights.items():
        assert np.array_equal(loaded.forecast_weights[name], weight), name
    changed = loaded.with_header(thresholds=CheckpointThresholds(0.2, 0.3))
    assert changed.forecaster is not None
    assert changed.weights.keys() == plain.weights.keys()


def test_a_header_without_the_part_of_the_forecast_is_an_old_checkpoint(file: Path) -> None:
    rewritten(file, lambda header: header.pop("forecast"))
    loaded = Checkpoint.load(file)
    assert loaded.digest == checkpoint().digest
    assert loaded.forecaster is None


def test_a_header_without_category_slopes_is_an_old_checkpoint(file: Path) -> None:
    rewritten(file, lambda header: header["architecture"].pop("category_slopes"))
    assert Checkpoint.load(file).digest == checkpoint().digest


def test_a_forecast_head_that_does_not_fit_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with_random_forecast(checkpoint()).save(path)
    rewritten(path, lambda header: header.pop("forecast"))
    with pytest.raises(CheckpointError, match="the forecast head's tensors do not fit"):
        Checkpoint.load(path)
    found = with_random_forecast(checkpoint())
    weights = dict(found.forecast_weights) | {"start.bias": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"tensor start\.bias is float32 \[3\]"):
        found.with_forecast(found.header.forecast or ForecastShape(), weights)
    weights["start.bias"] = np.full(6, np.nan, np.float32)
    with pytest.raises(CheckpointError, match=r"forecast\.start\.bias has values"):
        found.with_forecast(found.header.forecast or ForecastShape(), weights)


def test_a_forecast_head_of_unknown_inputs_is_rejected() -> None:
    found = with_random_forecast(checkpoint())
    shape = ForecastShape(context_size=12, hidden_size=6, bookkeeping=25)
    with pytest.raises(CheckpointError, match="this version knows no forecast head of 25 inputs"):
        found.with_forecast(shape, found.forecast_weights)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: No such file"):
        Checkpoint.load(tmp_path / "none.safetensors")


class Payload:
    """Object that does harm when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "harm"
    for name, content in (
        ("pickle", pickle.dumps(Payload(mark))),
        ("short", b"\x80\x04"),
        ("empty", b""),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            Checkpoint.load(path)
    torch.save({"recur": Payload(mark)}, tmp_path / "torch")
    with pytest.raises(CheckpointError):
        Checkpoint.load(tmp_path / "torch")
    assert not mark.exists()


def test_archives_are_refused_by_their_form_and_nothing_unpickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fallback to torch.load, zipfile or NumPy's loader would run code in the file."""
    mark = tmp_path / "harm"

    def forbidden(*_: object, **__: object) -> None:
        mark.mkdir()

    torch.save({"recur": Payload(mark)}, tmp_path / "zip", _use_new_zipfile_serialization=True)
    torch.save({"recur": Payload(mark)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Payload(mark)))
    np.save(tmp_path / "numpy", np.array([Payload(mark)], object), allow_pickle=True)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (np, "load")):
        monkeypatch.setattr(module, name, forbidden)
    for name in ("zip", "old", "archive", "numpy.npy"):
        with pytest.raises(CheckpointError, match=name):
            Checkpoint.load(tmp_path / name)
    assert not mark.exists()


def test_no_module_of_the_product_can_unpickle() -> None:
    """Nothing from outside is ever unpickled, not even checkpoints."""
    unpickling = re.compile(
        r"(?<!safetensors\.)\btorch\.load\(|\bnp\.load\((?!.*allow_pickle=False)"
        r"|\bimport (pickle|dill|joblib|marshal)"
        r"|from (pickle|dill|joblib|marshal) |shelve|weights_only"
    )
    product = [
        *Path(model.__file__).parent.rglob("*.py"),
        *Path(pipeline.__file__).parent.glob("*.py"),
    ]
    found = [
        f"{path.name}: {line.strip()}"
        for path in product
        for line in path.read_text().splitlines()
        if unpickling.search(line)
    ]
    assert not found


def test_a_file_cut_short_is_refused(file: Path) -> None:
    content = file.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 8):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Checkpoint.load(file)


def test_safetensors_of_something_else_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a checkpoint of Recur"):
        Checkpoint.load(tmp_path / "other")


def test_another_format_version_is_refused_before_its_header_is_read(file: Path) -> None:
    def newer(header: dict[str, object]) -> None:
        header.clear()
        header["format_version"] = 4

    with pytest.raises(CheckpointError, match="format version 4; this version of Recur reads 3"):
        Checkpoint.load(rewritten(file, newer))


def test_tensors_that_are_not_the_architectures_are_refused_by_name(file: Path) -> None:
    def wider(header: dict[str, object]) -> None:
        header["architecture"]["hidden_size"] = 9  # type: ignore[index]

    with pytest.raises(CheckpointError, match=r"tensor recurrent\.weight_ih_l0 .*\[27, 4\]"):
        Checkpoint.load(rewritten(file, wider))

    def deeper(header: dict[str, object]) -> None:
        header["architecture"] |= {"hidden_size": 8, "layers": 2}  # type: ignore[operator]

    with pytest.raises(CheckpointError, match=r"lacks the tensors recurrent\.bias_hh_l1"):
        Checkpoint.load(rewritten(file, deeper))


SIZES = {"inputs": 2, "input_size": 4, "hidden_size": 8, "head_size": 4}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("currency", "EURO", "currency"),
        ("architecture", {"inputs": 2, "layers": 99}, "layers is 99"),
        ("architecture", {"inputs": 3, "hidden_size": 10**9}, "hidden_size"),
        ("thresholds", {"review": 0.9, "decline": 0.1}, "under review"),
        ("features", {"inputs": [{"feature": "risk", "transform": "linear"}] * 2}, "'risk'"),
        ("features", {"inputs": [{"feature": "amount", "transform": "evil"}] * 2}, "evil"),
        ("features", {"inputs": [{"feature": "amount", "transform": "linear"}]}, "1 inputs"),
        ("features", {"inputs": [{"feature": "count_1d", "transform": "linear"}] * 2}, "roles"),
        ("architecture", SIZES | {"roles": ["amount", "own"]}, "the roles of the network's"),
        ("architecture", SIZES, "the roles of the network's inputs are not"),
        ("architecture", {"inputs": 2, "roles": ["amount"]}, "1 roles for 2 inputs"),
        ("architecture", {"inputs": 2, "rising_size": 3}, "rising_size is 3"),
    ],
)
def test_a_header_that_cannot_be_run_is_refused_with_its_reason(
    file: Path, field: str, value: object, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.load(rewritten(file, lambda header: header.update({field: value})))


def safetensors_of(header: bytes, tensors: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


DEEP = '{"a":' * 10_000
"""Objects in objects, deeper than any parser of them may go."""


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"recur":"\xa1"}}',
        b'{"__metadata__":{"recur":"\\ud800"}}',
        DEEP.encode(),
        b'{"a":' + b"[" * 10_000 + b'],"__metadata__":{"recur":"{}"}}',
        json.dumps({"__metadata__": {"recur": DEEP}}).encode(),
        json.dumps({"__metadata__": {"recur": '{"format_version":3,"training":' + DEEP}}).encode(),
    ],
)
def test_a_header_that_breaks_parsers_is_refused(tmp_path: Path, header: bytes) -> None:
    """Invalid UTF-8 and endless nesting raise other errors than invalid JSON."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(header))
    with pytest.raises(CheckpointError, match="header"):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**40, 2**40], [0, 8]),
        ([0, 2**63 - 1], [0, 0]),
        ([0, 2**62, 2**62], [0, 0]),
        ([2**64 - 1], [0, 8]),
        ([-1], [0, 4]),
        ([1], [4, 0]),
        ([1], [0, 2**63]),
        ([1.5], [0, 4]),
        ([1] * 1000, [0, 4]),
    ],
)
def test_tensors_of_impossible_size_are_rejected_without_allocating_them(
    file: Path, shape: list[float], offsets: list[int]
) -> None:
    """A shape is only a claim of the file, so no memory may be allocated for it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["logit.bias"] |= {"shape": shape, "data_offsets": offsets}
    file.write_bytes(safetensors_of(json.dumps(header).encode(), content[8 + length :]))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            Checkpoint.load(file)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_a_quote_of_a_file_in_a_message_is_one_bounded_line(file: Path) -> None:
    """An attacker chooses the content of a file, and messages go to logs and terminals."""
    evil = "\x1b[2J\n" + "x" * 100_000
    for change in (
        {"currency": evil},
        {"features": {"inputs": [{"feature": "amount", "transform": evil}] * 2}},
        {"features": {"inputs": [{"feature": evil, "transform": "linear"}] * 2}},
    ):
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.load(rewritten(file, lambda header, change=change: header.update(change)))  # type: ignore[misc]
        assert len(str(caught.value)) <= MESSAGE_MAX
        assert str(caught.value).isprintable()


def test_an_oversize_file_is_refused_without_reading_it(file: Path) -> None:
    with file.open("r+b") as sparse:
        sparse.truncate(FILE_MAX_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="over the limit"):
            Checkpoint.load(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_an_oversize_header_is_refused_without_reading_it(file: Path) -> None:
    with pytest.raises(CheckpointError, match="over the limit"):
        Checkpoint.load(
            rewritten(file, lambda header: header.update(currency="x" * HEADER_MAX_BYTES))
        )
    with pytest.raises(CheckpointError, match="over the limit"):
        checkpoint().with_header(training={"note": "x" * HEADER_MAX_BYTES}).save(file)


def test_weights_that_are_not_finite_are_refused(file: Path) -> None:
    weights = safetensors.torch.load_file(file)
    weights["logit.bias"][:] = torch.nan
    header = msgspec.json.encode(checkpoint().header).decode()
    safetensors.torch.save_file(weights, file, {"recur": header})
    with pytest.raises(CheckpointError, match=r"logit\.bias has values that are not finite"):
        Checkpoint.load(file)


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpoint().save(tmp_path / "file" / "model.safetensors")
