"""A generator's file is read back as written, and any other file is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from model.generator.generator import Generator
from model.generator.settings import GeneratorError
from pipeline.checkpoint import load_checkpoint
from pipeline.files.generated_stream import SHIPPED_GENERATOR
from pipeline.settings import load_settings
from tests.model.generator.small_generator import small_generator

DEFAULT_MAX_BYTES = 300_000


def test_a_saved_generator_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    small_generator().save(path)
    loaded = Generator.load(path)

    assert loaded.digest == small_generator().digest
    assert loaded.header == small_generator().header


def test_the_shipped_generator_loads_and_is_small() -> None:
    assert Generator.load(SHIPPED_GENERATOR).header.currency == "EUR"
    assert SHIPPED_GENERATOR.stat().st_size < DEFAULT_MAX_BYTES


def test_a_checkpoint_is_no_generator(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    load_checkpoint(load_settings()).save(path)

    with pytest.raises(GeneratorError, match="a checkpoint of `recur train` is another file"):
        Generator.load(path)


def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    small_generator().save(path)
    content = path.read_bytes()
    for damaged in (b"", b"x", content[:100], content[:-100], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(GeneratorError, match=r"g\.safetensors"):
            Generator.load(path)
    with pytest.raises(GeneratorError, match="cannot read the generator"):
        Generator.load(tmp_path / "none")


def test_weights_that_do_not_fit_the_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    generator = small_generator()
    weights = dict(generator.weights) | {"time.bias": np.zeros(3, np.float32)}
    Generator(generator.header, weights, generator.world, generator.density).save(path)
    with pytest.raises(GeneratorError, match="its weights do not fit the sizes"):
        Generator.load(path)

    header = msgspec.json.encode(msgspec.structs.replace(generator.header, format_version=99))
    safetensors.numpy.save_file(
        {"x": np.zeros(1)}, path, metadata={"recur-generator": header.decode()}
    )
    with pytest.raises(GeneratorError, match="format version 99"):
        Generator.load(path)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(GeneratorError, match="cannot write"):
        small_generator().save(tmp_path / "file" / "g.safetensors")
