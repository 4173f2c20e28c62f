"""Checkpoints: a network with the specification of its inputs and its metrics.

A checkpoint is one safetensors file. The tensors are the weights. Everything else is a JSON header
in the metadata of the file, under the key ``recur``. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from model.architecture import Architecture
from model.features.account import OUTLIER, Float32, Float64
from model.features.spec import Encoder, FeatureSpec, FeatureSpecError
from model.forecast.forecaster import Forecaster
from model.forecast.inputs import BOOKKEEPINGS, DAY_INPUTS
from model.forecast.shape import PREFIX, ForecastShape
from model.stepper import Stepper
from model.whole_file import write_whole

if TYPE_CHECKING:  # it imports torch
    from model.network import Network

FORMAT_VERSION = 3
"""Version of the header and of the tensors' names."""

HEADER_MAX_BYTES = 1 << 20
"""Largest safetensors header, including the JSON header."""

FILE_MAX_BYTES = 1 << 30
"""Largest checkpoint file."""

DIGEST_DIGITS = 12

TAIL_MAX = 20
"""Largest length of :attr:`Amounts.tail`: one payment in a million is rare enough."""

CURRENCY = "EUR"
"""Currency of the simulator's amounts."""

_METADATA_KEY = "recur"
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header

# RecursionError: brackets in brackets, a thousand deep.
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Probability = Annotated[float, msgspec.Meta(ge=0, le=1)]


MESSAGE_MAX = 1000
"""Longest message of a :class:`CheckpointError`, characters."""


class CheckpointError(Exception):
    """A file is not a checkpoint that this version can run; the message says why.

    The message may quote a file with any content, so it is one line of bounded length.
    """

    def __init__(self, message: str) -> None:
        shown = message if len(message) <= MESSAGE_MAX else message[: MESSAGE_MAX - 3] + "..."
        super().__init__(
            "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
        )


class CheckpointThresholds(msgspec.Struct, frozen=True):
    """Lowest scores of the decisions ``review`` and ``decline``."""

    review: Probability = 0.5
    decline: Probability = 0.9

    def __post_init__(self) -> None:
        if self.decline < self.review:
            raise ValueError(f"decline threshold {self.decline} is under review {self.review}")


class Amounts(msgspec.Struct, frozen=True):
    """Spread of the amounts in the training period, by which rare ones are recognised.

    Attributes:
        tail: amounts reached by a share of 1, 1/2, 1/4 and so on of all transactions.
        deviation: deviation of an account's amounts, relative to its usual amount.
    """

    tail: tuple[float, ...] = ()
    deviation: float = 0.5

    @classmethod
    def of(cls, amount: Float32 | Float64, to_usual: Float32 | Float64) -> Amounts:
        """Compute the spread of [N] amounts and their ratios [N] to the usual amounts.

        >>> Amounts.of(np.arange(8.0), np.array([0.5, 1.5] * 4))
        Amounts(tail=(0.0, 3.5, 5.25), deviation=0.5)
        """
        halvings = max(1, min(TAIL_MAX, int(np.log2(max(len(amount), 1)))))
        tail = np.quantile(amount, 1.0 - 0.5 ** np.arange(halvings)) if len(amount) else []
        outliers_cut = np.minimum(to_usual, OUTLIER) - 1.0
        deviation = float(np.sqrt(np.mean(outliers_cut**2))) if len(amount) else 0.5
        return cls(tuple(float(value) for value in tail), max(deviation, 0.01))


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Header of a checkpoint.

    Attributes:
        format_version: :data:`FORMAT_VERSION` of the code that wrote it.
        architecture: sizes of the network.
        features: specification of the inputs.
        currency: ISO 4217 code of the amounts in the training data.
        thresholds: chosen on the validation days.
        metrics: values by name, measured on the held-out days. The account head's are named
            ``verdict_auc`` and ``verdict_ap``.
        training: the settings of the training, with its seed, and ``model.training.loop.RECIPE``.
        operating_points: rows of :func:`model.metrics.operating_points` on the validation days,
            by falling threshold.
        validation: counts of the validation days: ``days``, ``transactions``, ``frauds``,
            ``fraud_amount_per_day`` and ``legitimate_amount_per_day``.
        amounts: spread of the amounts, for the reasons of alerts.
        data_digest: digest of the training data (12 hex digits).
        forecast: sizes and measures of the forecast head; None if there is none.
    """

    format_version: int = FORMAT_VERSION
    architecture: Architecture
    features: FeatureSpec
    currency: Annotated[str, msgspec.Meta(min_length=3, max_length=3)] = CURRENCY
    thresholds: CheckpointThresholds = CheckpointThresholds()
    metrics: dict[str, float] = {}
    training: dict[str, Any] = {}
    operating_points: list[list[float]] = []
    validation: dict[str, float] = {}
    amounts: Amounts | None = None
    data_digest: str = ""
    forecast: ForecastShape | None = None


class Checkpoint:
    """A trained network with its header.

    Args:
        weights: its tensors by name; see :meth:`Architecture.tensor_shapes`.
        forecast: the tensors of the forecast head, without :data:`PREFIX`, if the header has one.

    Attributes:
        weights: they do not change any more.
        forecast_weights: tensors of the forecast head; empty without one.
        header: see :class:`Header`.
        stepper: the network for a worker.
        digest: 12 hex digits over everything that decides scores and states: weights,
            architecture and feature specification. Thresholds, metrics and the forecast head are
            not, so a head that is added later keeps all states.

    Raises:
        CheckpointError: the header does not fit the network, or a weight is not finite.
    """

    def __init__(
        self,
        weights: Mapping[str, Float32],
        header: Header,
        forecast: Mapping[str, Float32] | None = None,
    ) -> None:
        forecast = forecast or {}
        _check_cell(header)
        try:  # first, because its message names the wrong input
            self._encoder = Encoder(header.features)
        except FeatureSpecError as error:
            raise CheckpointError(str(error)) from error
        _check_inputs(header)
        _check_forecast(forecast, header)
        named = {PREFIX + name: weight for name, weight in forecast.items()}
        for name, weight in {**weights, **named}.items():
            if not np.isfinite(weight).all():
                raise CheckpointError(f"the tensor {name} has values that are not finite")
        self.weights = weights
        self.forecast_weights = forecast
        self.header = header
        self.stepper = Stepper(header.architecture, weights)
        self.digest = _digest(weights, header)

    @classmethod
    def of(cls, network: Network, header: Header) -> Checkpoint:
        """Make a checkpoint of a copy of a network's weights."""
        if header.architecture != network.architecture:
            raise CheckpointError("the header's architecture is not the network's")
        return cls(network.weights(), header)

    @cached_property
    def forecaster(self) -> Forecaster | None:
        """The forecast head for a command or a gateway; None if the checkpoint has none."""
        if self.header.forecast is None:
            return None
        return Forecaster(self.forecast_weights, self.header.features.scale)

    @cached_property
    def network(self) -> Network:
        """The network in torch, in evaluation mode: a copy of the weights.

        Only training and evaluation need it. Torch takes seconds and 500 MB to import.
        """
        import torch

        from model.network import Network

        with torch.device("meta"):
            network = Network(self.header.architecture)
        weights = {name: torch.tensor(weight) for name, weight in self.weights.items()}
        network.load_state_dict(weights, assign=True)
        return network.eval().requires_grad_(False)

    def encode(self, raw: Float32) -> Float32:
        """Encode raw features [n, R] to the inputs [n, I] of the network."""
        return self._encoder.encode(raw)

    def outside(self, raw: Float32) -> NDArray[np.bool_] | None:
        """Return which raw features [n, R] are out of the training's range; None if none is."""
        return self._encoder.outside(raw)

    def with_header(self, **changes: Any) -> Checkpoint:
        """Return a checkpoint of the same network with changed entries of the header."""
        header = msgspec.structs.replace(self.header, **changes)
        return Checkpoint(self.weights, header, self.forecast_weights)

    def with_forecast(self, shape: ForecastShape, weights: Mapping[str, Float32]) -> Checkpoint:
        """Return a checkpoint of the same network and digest with this forecast head."""
        return Checkpoint(
            self.weights, msgspec.structs.replace(self.header, forecast=shape), weights
        )

    def save(self, path: Path) -> None:
        """Write the file completely or not at all; equal checkpoints give equal bytes.

        Raises:
            CheckpointError: the header is too long, or the file cannot be written.
        """
        text = msgspec.json.encode(self.header, order="deterministic").decode()
        tensors = dict(self.weights)
        tensors |= {PREFIX + name: weight for name, weight in self.forecast_weights.items()}
        content = safetensors.numpy.save(tensors, {_METADATA_KEY: text})
        if _header_bytes(content) > HEADER_MAX_BYTES:
            raise CheckpointError(
                f"the header of {path} would have {_header_bytes(content)} bytes, over the limit "
                f"of {HEADER_MAX_BYTES}; shorten its metrics or training settings"
            )
        try:
            write_whole(path, content)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read and check a checkpoint file.

        Raises:
            CheckpointError: there is no such file; it is not safetensors; its header is missing or
                too long; its format version is another; this version cannot compute its
                features; or its tensors do not fit the architecture.
        """
        content = _read(path)
        header = _header(content, path)
        try:
            _check_cell(header)
            weights = safetensors.numpy.load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
        forecast = {
            name.removeprefix(PREFIX): weights.pop(name)
            for name in sorted(weights)
            if name.startswith(PREFIX)
        }
        _check_tensors(weights, header.architecture, path)
        try:
            return cls(weights, header, forecast)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def _check_cell(header: Header) -> None:
    if header.architecture.cell != "gru":
        raise CheckpointError(f"a checkpoint holds a GRU, not {header.architecture.cell!r}")


def _check_inputs(header: Header) -> None:
    """Check that the feature specification fits the network."""
    architecture, features = header.architecture, header.features
    codes = tuple(codes for codes, _ in architecture.embeddings)
    numbers = len(features.roles)
    if numbers != architecture.inputs:
        raise CheckpointError(
            f"the feature specification has {numbers} inputs, the network takes "
            f"{architecture.inputs}"
        )
    if features.roles != architecture.roles:
        raise CheckpointError("the roles of the network's inputs are not those of their features")
    categories = tuple(i.feature for i in features.inputs if i.transform == "category")
    sizes = {field.name: 1 + len(field.vocabulary) for field in features.fields}
    if codes != tuple(sizes.get(name, 0) for name in categories):
        raise CheckpointError("the network's embeddings are not those of the feature specification")


def _check_forecast(weights: Mapping[str, NDArray[Any]], header: Header) -> None:
    """Check that the tensors of the forecast head are those that the header describes."""
    expected: dict[str, tuple[int, ...]] = {}
    if header.forecast is not None:
        inputs = header.forecast.bookkeeping
        if inputs not in [len(names) for names in BOOKKEEPINGS]:
            raise CheckpointError(f"this version knows no forecast head of {inputs} inputs")
        encoder = header.architecture.hidden_size
        expected = header.forecast.tensor_shapes(encoder, len(DAY_INPUTS))
    if expected.keys() != weights.keys():
        wrong = ", ".join(sorted(expected.keys() ^ weights.keys()))
        raise CheckpointError(
            f"the forecast head's tensors do not fit the header: {wrong[:200]} missing or unknown"
        )
    for name, shape in expected.items():
        found = weights[name]
        if found.shape != shape or found.dtype != np.float32:
            raise CheckpointError(
                f"the forecast head's tensor {name} is {found.dtype} {list(found.shape)}; the "
                f"header needs float32 {list(shape)}"
            )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)  # read() allocates as much as it is asked for
            if size > FILE_MAX_BYTES:
                raise CheckpointError(f"{path} is over the limit of {FILE_MAX_BYTES} bytes")
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error.strerror or error}"
        ) from error


def _header_bytes(content: bytes) -> int:
    return int.from_bytes(content[:_LENGTH_BYTES], "little")


class _Metadata(msgspec.Struct, frozen=True):
    recur: str


class _SafetensorsHeader(msgspec.Struct, frozen=True):
    metadata: _Metadata = msgspec.field(name="__metadata__")


class _Version(msgspec.Struct, frozen=True):
    format_version: int


def _header(content: bytes, path: Path) -> Header:
    length = _header_bytes(content)
    if length > HEADER_MAX_BYTES:
        raise CheckpointError(
            f"{path} is not a checkpoint: its header would have {length} bytes, over the limit "
            f"of {HEADER_MAX_BYTES}"
        )
    if len(content) < _LENGTH_BYTES + length:
        raise CheckpointError(f"{path} is not a whole safetensors file: it ends in its header")
    try:
        outer = msgspec.json.decode(
            content[_LENGTH_BYTES : _LENGTH_BYTES + length], type=_SafetensorsHeader
        )
    except _NOT_JSON as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of Recur: its safetensors header has no text under "
            f"__metadata__.{_METADATA_KEY} ({error})"
        ) from error
    text = outer.metadata.recur
    try:
        version = msgspec.json.decode(text, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this version of Recur reads "
                f"{FORMAT_VERSION}: train it again, or install the version that wrote it"
            )
        return msgspec.json.decode(text, type=Header)
    except (*_NOT_JSON, ValueError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error}") from error


def _check_tensors(
    weights: Mapping[str, NDArray[Any]], architecture: Architecture, path: Path
) -> None:
    expected = architecture.tensor_shapes()
    if missing := sorted(expected.keys() - weights.keys()):
        raise CheckpointError(f"{path} lacks the tensors {', '.join(missing)}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(f"{path} has unknown tensors: {', '.join(unknown)[:200]}")
    for name, shape in expected.items():
        found = weights[name]
        if found.shape != shape or found.dtype != np.float32:
            raise CheckpointError(
                f"{path}: tensor {name} is {found.dtype} {list(found.shape)}; the header's "
                f"architecture needs float32 {list(shape)}"
            )


def _digest(weights: Mapping[str, Float32], header: Header) -> str:
    digest = hashlib.sha256()
    sizes = msgspec.to_builtins(header.architecture)
    if not header.architecture.category_slopes:  # as before the field existed
        sizes.pop("category_slopes", None)
    digest.update(msgspec.json.encode(sizes))
    digest.update(msgspec.json.encode(header.features, order="deterministic"))
    for name, weight in sorted(weights.items()):
        array = np.ascontiguousarray(weight, dtype="<f4")
        digest.update(f"{name}{list(array.shape)}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:DIGEST_DIGITS]
