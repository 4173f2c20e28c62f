"""Public class names: each stands for one class in model/ and pipeline/."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping

import pytest

from tests.test_layers import product_sources


def public_classes(source: str) -> list[str]:
    """Names of a module's public classes, those made by a call included."""
    found = []
    for node in ast.parse(source).body:
        match node:
            case ast.ClassDef(name=name):
                found.append(name)
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(attr="defstruct") | ast.Name(id="namedtuple")),
            ):
                found.append(name)
    return [name for name in found if not name.startswith("_")]


def repeated(sources: Mapping[str, str]) -> list[str]:
    """Describe each name of several classes in a line."""
    modules = defaultdict(list)
    for module, source in sources.items():
        for name in public_classes(source):
            modules[name].append(module)
    return [f"{name}: {', '.join(of)}" for name, of in sorted(modules.items()) if len(of) > 1]


def test_a_public_class_name_stands_for_one_class() -> None:
    found = repeated(product_sources())

    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "second", ["class Part:\n  pass", "import msgspec\nPart = msgspec.defstruct('Part', [])"]
)
def test_a_repeated_name_is_found_and_a_private_one_is_not(second: str) -> None:
    first = "class Part: pass\nclass _Row: pass"

    assert repeated({"a": first, "b": second, "c": "class _Row: pass"}) == ["Part: a, b"]
