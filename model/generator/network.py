"""The generator's network in PyTorch, for training; unrolling is in NumPy.

    inputs -> GRU -> hidden state h                      the last transaction, the profile
    h -> time class                                      + Poisson process with the rhythm
    h, day -> half hour                                  + the rhythm
    h, time -> z -> fraud on the account
    z, fraud -> merchant class                           + choice at random among those in reach
    z, fraud, merchant class -> y -> amount, and y, amount -> further fields

Each head adds its logits to those of a simple model, so it learns the difference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.generator import grids
from model.generator.lessons import AT_COLUMN, CENSORED, NO_TARGET
from model.generator.memory import FRAUD_STATES, TIME_INPUTS
from model.generator.sizes import FRAUD_CLASSES, GeneratorSizes


class GeneratorNetwork(nn.Module):
    """The network; its parameters have the names of :meth:`GeneratorSizes.tensor_shapes`."""

    def __init__(self, sizes: GeneratorSizes) -> None:
        super().__init__()
        h, z = sizes.hidden, sizes.head
        self.sizes = sizes
        self.gru = nn.GRU(sizes.inputs, h, batch_first=True)
        self.time = nn.Linear(h, grids.TIME_CLASSES)
        self.slot = nn.Linear(h, grids.SLOTS, bias=False)
        self.slot_day = nn.Parameter(torch.zeros(2, grids.SLOTS))
        self.slot_weekday = nn.Parameter(torch.zeros(7, grids.SLOTS))
        self.time_state = nn.Parameter(torch.zeros(FRAUD_STATES, grids.TIME_CLASSES))
        self.slot_state = nn.Parameter(torch.zeros(FRAUD_STATES, grids.SLOTS))
        self.known_time = nn.Linear(TIME_INPUTS, z, bias=False)
        self.known_hidden = nn.Linear(h, z)
        self.fraud = nn.Linear(z, 1)
        self.fraud_state = nn.Parameter(torch.zeros(FRAUD_STATES))
        self.fraud_slot = nn.Parameter(torch.zeros(grids.SLOTS))
        self.fraud_rate = nn.Parameter(torch.zeros(1))
        self.merchant = nn.Linear(z, sizes.merchants)
        self.merchant_fraud = nn.Parameter(torch.zeros(sizes.merchants))
        self.spent = nn.Linear(z, z)
        self.spent_fraud = nn.Parameter(torch.zeros(FRAUD_CLASSES, z))
        self.spent_merchant = nn.Parameter(torch.zeros(sizes.merchants, z))
        self.spent_group = nn.Parameter(torch.zeros(sizes.groups, z))
        self.amount_group = nn.Parameter(torch.zeros(FRAUD_CLASSES * sizes.groups, sizes.amounts))
        self.amount = nn.Linear(z, sizes.amounts)
        for number, classes in enumerate(sizes.fields):
            self.add_module(f"field_{number}", nn.Linear(z, classes))
            table = nn.Parameter(torch.zeros(sizes.amounts, classes))
            self.register_parameter(f"field_{number}_amount", table)
        layers = (self.time, self.slot, self.fraud, self.merchant, self.amount)
        for layer in layers:  # begin as the simple models
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, inputs: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unroll inputs [n, T, I] from hidden states [1, n, H]; return the hidden states."""
        states, last = self.gru(inputs, hidden)
        return states, last

    def logits(
        self, state: Tensor, time_inputs: Tensor, targets: Tensor
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Compute the logits of all heads, without the simple models.

        Args:
            state: [m, H] hidden states.
            time_inputs: [m, TIME_INPUTS].
            targets: [m, columns]; each head is given what was chosen before it.
        """
        day = targets[:, AT_COLUMN["day_kind"]].clamp(min=0)
        weekday = targets[:, AT_COLUMN["weekday"]].clamp(min=0)
        fraud_class = targets[:, AT_COLUMN["class"]].clamp(min=0)
        kind = targets[:, AT_COLUMN["merchant"]].clamp(min=0)
        amount = targets[:, AT_COLUMN["amount"]].clamp(min=0)
        group, last, now, at = (
            targets[:, AT_COLUMN[name]].clamp(min=0)
            for name in ("group", "state", "state_now", "slot_now")
        )
        z = F.relu(self.known_hidden(state) + self.known_time(time_inputs))
        chosen = self.spent_merchant[kind] + self.spent_group[group]
        y = F.relu(self.spent(z) + self.spent_fraud[fraud_class] + chosen)
        slot = self.slot(state) + self.slot_day[day] + self.slot_weekday[weekday]
        odds = self.fraud_state[now] + self.fraud_slot[at] + self.fraud_rate * time_inputs[:, -1]
        found = {
            "time": self.time(state) + self.time_state[last],
            "slot": slot + self.slot_state[last],
            "fraud": self.fraud(z).squeeze(1) + odds,
            "merchant": self.merchant(z) + self.merchant_fraud * (fraud_class == 1)[:, None],
            "amount": self.amount(y) + self.amount_group[fraud_class * self.sizes.groups + group],
        }
        fields = [
            self.get_submodule(f"field_{number}")(y)
            + self.get_parameter(f"field_{number}_amount")[amount]
            for number in range(len(self.sizes.fields))
        ]
        return found, fields


def losses(
    network: GeneratorNetwork,
    state: Tensor,
    time_inputs: Tensor,
    targets: Tensor,
    field_targets: Tensor,
    hub_edge: Tensor,
    bases: Sequence[Tensor],
) -> Tensor:
    """Return the summed negative log likelihoods: time, slot, fraud, merchant, amount, fields.

    Args:
        state: [m, H] hidden states.
        time_inputs: [m, TIME_INPUTS].
        targets: [m, columns].
        field_targets: [m, F].
        hub_edge: [m] see :class:`model.generator.lessons.Lessons`.
        bases: logits of the simple models for time, half hour, fraud and merchant.
    """
    found, fields = network.logits(state, time_inputs, targets)
    time_base, slot_base, fraud_base, merchant_base = bases
    column = {name: targets[:, place] for name, place in AT_COLUMN.items()}
    going = column["time"] >= 0
    log_time = F.log_softmax(found["time"] + time_base, 1)
    total = [F.nll_loss(log_time[going], column["time"][going], reduction="sum")]
    over = column["time"] == CENSORED
    if over.any():
        first = column["slot"][over, None]
        later = torch.arange(grids.TIME_CLASSES) >= first
        total[0] = total[0] - log_time[over].masked_fill(~later, -1e4).logsumexp(1).sum()
    slots = going & (column["slot"] >= 0)
    total.append(
        F.cross_entropy((found["slot"] + slot_base)[slots], column["slot"][slots], reduction="sum")
    )
    asked = going & (column["fraud"] != NO_TARGET)
    total.append(
        F.binary_cross_entropy_with_logits(
            (found["fraud"] + fraud_base)[asked], column["fraud"][asked].float(), reduction="sum"
        )
    )
    log_merchant = F.log_softmax((found["merchant"] + merchant_base)[going], 1)
    taken = log_merchant.gather(1, column["merchant"][going, None]).squeeze(1)
    hub = column["hub"][going]
    either = hub >= 0  # a hub that was seen before: by its rank, or as a hub again
    if either.any():
        as_hub = log_merchant[either].gather(1, hub[either, None]).squeeze(1)
        both = torch.logaddexp(taken[either] + hub_edge[going][either], as_hub)
        taken = taken.masked_scatter(either, both)
    total.append(-taken.sum())
    total.append(F.cross_entropy(found["amount"][going], column["amount"][going], reduction="sum"))
    extra = state.new_zeros(())
    for number, logits in enumerate(fields):
        extra = extra + F.cross_entropy(
            logits[going], field_targets[going, number].long(), reduction="sum"
        )
    return torch.stack([*total, extra])
