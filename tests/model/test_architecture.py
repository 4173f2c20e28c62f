"""The sizes of a network decide the shapes of its tensors."""

from __future__ import annotations

import pytest
import torch

from model.architecture import Architecture
from model.network import Network


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(3),
        Architecture(3, 5, 7, layers=3, head_size=6, rising_size=4),
        Architecture(3, embeddings=((9, 2), (4, 5)), roles=("own", "merchant", "amount")),
        Architecture(1, roles=("frauds",)),
        Architecture(1, embeddings=((9, 2), (4, 5)), rising_size=6, category_slopes=True),
    ],
)
def test_the_shapes_of_tensors_are_those_of_the_network(architecture: Architecture) -> None:
    with torch.device("meta"):
        tensors = Network(architecture).state_dict()

    shapes = architecture.tensor_shapes()

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
