"""A membership attack with a generator's file: are the accounts that trained it more likely?

The attacker has the file and whole histories, labels included. Under the generator's tables and
weights, each history has a likelihood: that of its transactions, each given those before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.data.dataset import MISSING, Dataset
from model.generator.fields import GeneratedField, classes_of
from model.generator.generator import Generator
from model.generator.lessons import Lessons, make_lessons
from model.generator.network import GeneratorNetwork
from model.generator.train import step_losses
from model.generator.world import measure
from model.metrics import auc_roc
from model.torch_threads import one_thread

Floats = NDArray[np.float64]

ACCOUNTS_AT_ONCE = 64


def likelihood_auc(generator: Generator, members: Dataset, others: Dataset) -> float:
    """Return the AUC of guessing the training's accounts by their likelihood.

    Args:
        generator: trained on the members.
        members: their accounts have the codes 0, 1, 2 ...
        others: accounts that did not train, with codes of their own.
    """
    found = [account_losses(generator, log) for log in (members, others)]
    truth = np.repeat([True, False], [len(part) for part in found])
    return float(auc_roc(-np.concatenate(found), truth))


def account_losses(generator: Generator, log: Dataset) -> Floats:
    """Return the negative log likelihood [accounts] of each history, in nats a transaction.

    The profiles are measured as in training, with its seed. So the accounts of the training get
    the very inputs that trained the network, which favours the attack.

    Args:
        generator: the generator.
        log: its accounts have the codes 0, 1, 2 ... without gaps.
    """
    header = generator.header
    group, groups = _groups(log, header.fields)
    measured = measure(log, int(header.training.get("seed", 1)), group, groups)
    measured = dataclasses.replace(measured, world=generator.world)
    own = [field for field in header.fields if field.owner == "transaction"]
    classes = np.zeros((len(log), len(own)), np.int8)
    for place, field in enumerate(own):
        classes[:, place] = _classes(log, field)
    lessons = make_lessons(log, measured, classes, header.sizes.fields)
    network = GeneratorNetwork(header.sizes).eval()
    network.load_state_dict(
        {name: torch.from_numpy(np.array(weight)) for name, weight in generator.weights.items()}
    )
    order = np.argsort(-lessons.length, kind="stable")
    found = np.zeros(len(order))
    with one_thread(), torch.inference_mode():
        for begin in range(0, len(order), ACCOUNTS_AT_ONCE):
            batch = order[begin : begin + ACCOUNTS_AT_ONCE]
            found[batch] = _losses(network, lessons, batch)
    return found / np.maximum(lessons.length - 1, 1)


def _losses(network: GeneratorNetwork, lessons: Lessons, batch: NDArray[np.intp]) -> Floats:
    """Return the summed losses [n] of accounts."""
    start, length = lessons.start[batch], lessons.length[batch]
    within = np.minimum(np.arange(int(length.max())), length[:, None] - 1)
    states, _ = network(torch.from_numpy(lessons.inputs[start[:, None] + within]), None)
    found = [
        history_loss(network, lessons, int(account), states[place, : int(length[place])])
        for place, account in enumerate(batch)
    ]
    return torch.stack(found).numpy().astype(np.float64)


def history_loss(
    network: GeneratorNetwork, lessons: Lessons, account: int, states: torch.Tensor
) -> torch.Tensor:
    """Return the summed loss of an account's steps, whose hidden states are given [steps, H]."""
    begin = int(lessons.start[account])
    return step_losses(network, lessons, slice(begin, begin + len(states)), states).sum()


def _groups(log: Dataset, fields: Sequence[GeneratedField]) -> tuple[NDArray[np.int64] | None, int]:
    """Return the groups [merchants] that the generator knows, and their number."""
    for field in fields:
        if field.groups:
            group = np.zeros(int(log.merchant.max()) + 1, np.int64)
            group[log.merchant] = _classes(log, field)
            return group, field.classes
    return None, 1


def _classes(log: Dataset, field: GeneratedField) -> NDArray[np.int64]:
    """Return the classes [N] of a field; what the generator does not know is missing."""
    last = field.classes - 1
    if field.is_numeric:
        values = np.asarray(log.numeric[field.name], np.float64)
        return classes_of(values, np.array(field.edges))
    known = {text: place for place, text in enumerate(field.texts)}
    codes = np.asarray(log.categorical[field.name])
    by_code = np.array([*(known.get(text, last) for text in log.texts[field.name]), last])
    return np.where(codes == MISSING, last, by_code[codes])
