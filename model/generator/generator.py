"""A trained generator and its file: safetensors with a JSON header, never pickled.

The file holds the weights, the world's tables and the density of profiles. It holds no id, no
transaction and no profile of the training data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from model.generator.episodes import EPISODE_QUANTILES
from model.generator.fields import GeneratedField
from model.generator.grids import SLOTS
from model.generator.profiles import PROFILE, ProfileDensity
from model.generator.settings import GeneratorError
from model.generator.sizes import GeneratorSizes
from model.generator.world import NUMBERS, SharedWorld
from model.whole_file import write_whole

GENERATOR_FORMAT = 3
"""Version of the header and of the tensors' names."""

FORMAT_WITHOUT_EPISODES = 2
"""Older version that is read, too: its world has no tables of episodes."""

GENERATOR_FILE_MAX_BYTES = 1 << 26
HEADER_MAX_BYTES = 1 << 20

_METADATA_KEY = "recur-generator"
_LENGTH_BYTES = 8
_PREFIXES = ("network.", "world.", "density.")


class GeneratorHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Header of a generator file.

    Attributes:
        format_version: :data:`GENERATOR_FORMAT` of the code that wrote it.
        sizes: sizes of the network.
        fields: extra fields of the transactions.
        currency: ISO 4217 code of the amounts.
        start_ms: midnight of the first day of the training data.
        id_mark: begins every generated id. It is a digest of the training data, so ids of the
            training data cannot begin with it.
        training: settings, counts and losses of the training.
    """

    format_version: int = GENERATOR_FORMAT
    sizes: GeneratorSizes
    fields: list[GeneratedField] = []
    currency: Annotated[str, msgspec.Meta(min_length=3, max_length=3)] = "EUR"
    start_ms: int = 0
    id_mark: Annotated[str, msgspec.Meta(pattern="^G[0-9a-f]{8}$")]
    training: dict[str, Any] = {}


@dataclass(frozen=True)
class Generator:
    """A trained generator.

    Attributes:
        header: see :class:`GeneratorHeader`.
        weights: of the network, by name.
        world: the facts that all histories share.
        density: the density of profiles.
    """

    header: GeneratorHeader
    weights: Mapping[str, NDArray[np.float32]]
    world: SharedWorld
    density: ProfileDensity

    @property
    def digest(self) -> str:
        """12 hex digits over everything that decides the histories."""
        return hashlib.sha256(self._content()).hexdigest()[:12]

    def _content(self) -> bytes:
        tensors = {f"network.{name}": value for name, value in self.weights.items()}
        for prefix, tables in (("world", self.world), ("density", self.density)):
            for name, table in tables.tables().items():
                tensors[f"{prefix}.{name}"] = np.ascontiguousarray(table, np.float64)
        text = msgspec.json.encode(self.header, order="deterministic").decode()
        return safetensors.numpy.save(tensors, {_METADATA_KEY: text})

    def save(self, path: Path) -> None:
        """Write the file completely or not at all.

        Raises:
            GeneratorError: the file cannot be written.
        """
        try:
            write_whole(path, self._content())
        except OSError as error:
            raise GeneratorError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> Generator:
        """Read and check a generator file.

        Raises:
            GeneratorError: there is no such file, it is no generator, or it does not fit this
                version.
        """
        content = _read(path)
        header = _header(content, path)
        try:
            tensors = safetensors.numpy.load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise GeneratorError(f"{path} is not a whole safetensors file: {error}") from error
        parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in _PREFIXES}
        for name, value in tensors.items():
            prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
            if prefix is None:
                raise GeneratorError(f"{path} has an unknown tensor {name[:100]!r}")
            if not np.isfinite(value).all() and name != "world.numbers":
                raise GeneratorError(f"{path}: the tensor {name} has values that are not finite")
            parts[prefix][name.removeprefix(prefix)] = value
        try:
            world = SharedWorld(**parts["world."])
            density = ProfileDensity(**parts["density."])
        except TypeError as error:
            raise GeneratorError(f"{path} lacks tables of a generator: {error}") from error
        _check(header, parts["network."], world, density, path)
        return cls(header, parts["network."], world, density)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > GENERATOR_FILE_MAX_BYTES:
            raise GeneratorError(f"{path} is over the limit of {GENERATOR_FILE_MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise GeneratorError(
            f"cannot read the generator {path}: {error.strerror or error}"
        ) from error


class _Outer(msgspec.Struct, frozen=True):
    metadata: dict[str, str] = msgspec.field(name="__metadata__")


class _Version(msgspec.Struct, frozen=True):
    format_version: int


def _header(content: bytes, path: Path) -> GeneratorHeader:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if length > HEADER_MAX_BYTES or len(content) < _LENGTH_BYTES + length:
        raise GeneratorError(f"{path} is not a generator: it is no whole safetensors file")
    try:
        outer = msgspec.json.decode(content[_LENGTH_BYTES : _LENGTH_BYTES + length], type=_Outer)
        text = outer.metadata[_METADATA_KEY]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError) as error:
        raise GeneratorError(
            f"{path} is not a generator: `recur train-generator` writes one, and a checkpoint of"
            " `recur train` is another file"
        ) from error
    try:
        version = msgspec.json.decode(text, type=_Version).format_version
        if version not in (FORMAT_WITHOUT_EPISODES, GENERATOR_FORMAT):
            raise GeneratorError(
                f"{path} has format version {version}; this version of Recur reads"
                f" {FORMAT_WITHOUT_EPISODES} and {GENERATOR_FORMAT}: train it again"
            )
        return msgspec.json.decode(text, type=GeneratorHeader)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GeneratorError(f"{path} has a header that cannot be read: {error}") from error


def _check(
    header: GeneratorHeader,
    weights: Mapping[str, NDArray[Any]],
    world: SharedWorld,
    density: ProfileDensity,
    path: Path,
) -> None:
    sizes = header.sizes
    expected = sizes.tensor_shapes()
    found = {name: weight.shape for name, weight in weights.items()}
    if found != expected or any(w.dtype != np.float32 for w in weights.values()):
        raise GeneratorError(f"{path}: its weights do not fit the sizes in its header")
    places = len(PROFILE)
    planned = header.format_version != FORMAT_WITHOUT_EPISODES
    fits = (
        world.episode_slope.shape == (planned,)
        and world.episode_sizes.shape == (planned * EPISODE_QUANTILES,)
        and world.episode_rhythm.shape == (planned * SLOTS,)
        and world.numbers.shape == (len(NUMBERS),)
        and world.profile_mean.shape == world.profile_scale.shape == (places,)
        and world.rhythm.shape == (7 * SLOTS + 1,)
        and world.ratio_edges.shape == (sizes.amounts + 1,)
        and world.group_shares.shape == (sizes.groups,)
        and world.hub_groups.shape == world.hub_shares.shape
        and density.mean.shape[1:] == (places,)
        and density.quantiles.shape[0] == places
    )
    if not fits:
        raise GeneratorError(f"{path}: its tables do not fit this version of Recur")
