"""An interrupted comparison of generators goes on with the parts that are not finished."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from model.evaluation.discriminators import Discrimination
from model.evaluation.kept_parts import KeptParts
from tests.model.generator.small_generator import small_generator


def _again() -> NoReturn:
    raise AssertionError("a finished part is computed again")


def test_finished_parts_are_not_computed_again(tmp_path: Path) -> None:
    found = Discrimination(0.5, 0.6, ["gap"])
    first = KeptParts(tmp_path)
    assert first.result("real-precision", float, lambda: 0.25) == 0.25
    assert first.result("real-discriminators", Discrimination, lambda: found) == found
    assert first.generator(small_generator).digest == small_generator().digest

    second = KeptParts(tmp_path)
    assert second.result("real-precision", float, _again) == 0.25
    assert second.result("real-discriminators", Discrimination, _again) == found
    assert second.generator(_again).digest == small_generator().digest


def test_a_part_that_fails_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        KeptParts(tmp_path).result("attack", float, _again)
    assert KeptParts(tmp_path).result("attack", float, lambda: 0.5) == 0.5
