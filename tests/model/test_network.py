"""The network: its parts, its cells, and its score that never falls with more money."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from model.architecture import Architecture, Cell
from model.features.spec import Role
from model.network import Network
from model.stepper import Stepper

INPUTS = 17


def network(layers: int = 1, **sizes: Any) -> Network:
    torch.manual_seed(layers)
    made = Network(Architecture(INPUTS, layers=layers, **sizes)).eval()
    for parameter in made.parameters():  # larger than at the start, as after training
        parameter.data.mul_(2.0)
    return made


def scores_of(net: Network, inputs: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits [n] of one transaction each, as a worker computes them."""
    stepper = Stepper(net.architecture, net.weights())
    return torch.from_numpy(stepper.step(inputs.numpy(), hidden.numpy())[0])


ROLES: tuple[Role, ...] = (
    *("own", "amount", "frauds", "fraud_ages", "merchant") * 3,
    *("amount", "any_fraud"),
)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("embeddings", [(), ((4, 3), (6, 2))])
@pytest.mark.parametrize(
    ("roles", "falls_without"), [(("amount",), False), (("frauds", "any_fraud"), True)]
)
def test_more_money_and_more_known_frauds_never_lower_the_score(
    seed: int,
    embeddings: tuple[tuple[int, int], ...],
    roles: tuple[Role, ...],
    falls_without: bool,
) -> None:
    """This holds for any weights, if history and all other inputs are fixed."""
    torch.manual_seed(seed)
    sizes = Architecture(INPUTS, roles=ROLES, embeddings=embeddings, category_slopes=True)
    net = Network(sizes).eval()
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter)
    rising = [i for i, role in enumerate(ROLES) if role in roles]
    any_fraud = ROLES.index("any_fraud")
    codes = [torch.randint(0, n, (200, 1, 1)) for n, _ in embeddings]
    inputs = torch.cat((torch.randn(200, 1, INPUTS), *codes), -1)
    inputs[:, :, any_fraud] = torch.rand(200, 1)
    more = inputs.repeat(1, 50, 1)
    more[:, :, rising] += torch.linspace(0, 30, 50)[None, :, None]
    hidden = torch.randn(200, 1, 128).repeat_interleave(50, 0)
    logits = scores_of(net, more.flatten(0, 1), hidden).view(200, 50)
    assert (logits.diff(dim=1) >= -1e-3).all()
    assert (logits[:, -1] - logits[:, 0] > 1e-2).float().mean() > 0.9
    if falls_without:  # none known: fraud ages do not matter, and the score is lowest
        none = inputs.clone()
        none[:, :, any_fraud] = 0.0
        least = scores_of(net, none[:, 0], hidden[::50])
        assert (logits[:, 0] >= least - 1e-3).all()
        none[:, :, [i for i, role in enumerate(ROLES) if role == "fraud_ages"]] = 3.0
        again = scores_of(net, none[:, 0], hidden[::50])
        torch.testing.assert_close(again, least)


def test_with_category_slopes_a_category_decides_how_steeply_the_score_rises() -> None:
    roles: list[Role] = ["amount"]
    roles += ["own" for _ in range(INPUTS - 1)]
    net = network(roles=tuple(roles), embeddings=((3, 2),), category_slopes=True)
    cast("nn.Embedding", net.slopes[0]).weight.data[2] = 2.0
    cast("nn.Embedding", net.embeddings[0]).weight.data.zero_()  # nothing else depends on it
    inputs = torch.zeros(2, 50, INPUTS + 1)
    inputs[:, :, 0] = torch.linspace(0, 4, 50)
    inputs[:, :, -1] = torch.tensor([[1.0], [2.0]])
    flat, steep = scores_of(net, inputs.flatten(0, 1), torch.zeros(100, 1, 128)).view(2, 50)
    torch.testing.assert_close(steep[0], flat[0])
    assert steep[-1] > flat[-1] + 1.0


def test_a_score_depends_on_the_state_before_its_transaction_alone() -> None:
    net = network()
    inputs = torch.randn(4, 2, INPUTS)
    first, after = net.unroll(inputs[:, :1])
    whole, _ = net.unroll(inputs)
    torch.testing.assert_close(whole[:, 0], first[:, 0])
    other, _ = net.unroll(inputs[:, 1:], torch.zeros_like(after))
    assert (whole[:, 1] - other[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("layers", [1, 2])
def test_a_cut_sequence_continues_from_its_hidden_state(layers: int) -> None:
    net = network(layers, hidden_size=16)
    inputs = torch.randn(4, 30, INPUTS)
    whole, last = net.unroll(inputs)
    first, hidden = net.unroll(inputs[:, :11])
    second, hidden = net.unroll(inputs[:, 11:], hidden)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"inputs": 0}, "inputs"),
        ({"inputs": 3, "hidden_size": 5000}, "hidden_size"),
        ({"inputs": 3, "layers": 9}, "layers"),
        ({"inputs": 3, "dropout": 1.0}, "dropout"),
    ],
)
def test_an_architecture_out_of_bounds_is_refused_by_name(
    wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"^{named} is "):
        Architecture(**wrong)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
def test_every_cell_gives_the_same_whether_unrolled_at_once_or_in_chunks(cell: Cell) -> None:
    net = network(layers=2, cell=cell, hidden_size=8)
    inputs = torch.randn(3, 10, INPUTS, generator=torch.Generator().manual_seed(0))
    whole, after = net.unroll(inputs)
    first, between = net.unroll(inputs[:, :4])
    second, last = net.unroll(inputs[:, 4:], between)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(last, after, atol=1e-5, rtol=0)
    if cell == "none":  # one transaction alone
        torch.testing.assert_close(net.unroll(inputs[:, 5:6])[0][:, 0], whole[:, 5])


def test_a_category_changes_the_score_by_its_own_vector_only() -> None:
    net = network(embeddings=((3, 4), (5, 2)))
    numbers = torch.zeros(3, INPUTS)
    codes = torch.tensor([[0.0, 4.0], [1.0, 4.0], [1.0, 4.0]])
    logits = scores_of(net, torch.cat((numbers, codes), 1), net.empty_hidden(3))
    assert logits[0] != logits[1]
    torch.testing.assert_close(logits[1], logits[2])  # last bits depend on the place in a batch
    cast(nn.Embedding, net.embeddings[0]).weight.data[2] += (
        1.0  # changes the vector of an unused code
    )
    again = scores_of(net, torch.cat((numbers, codes), 1), net.empty_hidden(3))
    torch.testing.assert_close(again, logits)


def test_an_embedding_starts_as_torchs_and_is_fast_on_the_meta_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There torch would import its compiler to draw values, which takes seconds."""
    architecture = Architecture(2, 4, 4, embeddings=((5, 3), (4, 2)))
    torch.manual_seed(3)
    network = Network(architecture)
    torch.manual_seed(3)
    plain = [nn.Embedding(5, 3), nn.Embedding(4, 2)]
    for mine, its in zip(network.embeddings, plain, strict=True):
        assert isinstance(mine, nn.Embedding)
        assert torch.equal(mine.weight, its.weight)
        assert mine.weight.requires_grad

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("values are drawn on the meta device")

    monkeypatch.setattr(nn.init, "normal_", forbidden)
    with torch.device("meta"):
        shapes = Network(architecture).state_dict()
    assert {name: weight.shape for name, weight in shapes.items()} == {
        name: weight.shape for name, weight in network.state_dict().items()
    }
