"""Sizes of the generator's network, and the shapes of its weights."""

from __future__ import annotations

import msgspec

from model.generator import grids
from model.generator.memory import FRAUD_STATES, TIME_INPUTS

FRAUD_CLASSES = 3
"""Classes of whose a fraud is, which the head of amounts knows."""


class GeneratorSizes(msgspec.Struct, frozen=True):
    """Sizes of the network."""

    inputs: int
    hidden: int
    head: int
    amounts: int
    groups: int = 1
    """Groups of merchants."""
    fields: list[int] = []
    """Classes of each field."""

    @property
    def merchants(self) -> int:
        """Classes of merchants."""
        return grids.HUB + self.groups

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the weights by name."""
        h, z = self.hidden, self.head
        shapes: dict[str, tuple[int, ...]] = {
            "gru.weight_ih_l0": (3 * h, self.inputs),
            "gru.weight_hh_l0": (3 * h, h),
            "gru.bias_ih_l0": (3 * h,),
            "gru.bias_hh_l0": (3 * h,),
            "time.weight": (grids.TIME_CLASSES, h),
            "time.bias": (grids.TIME_CLASSES,),
            "slot.weight": (grids.SLOTS, h),
            "slot_day": (2, grids.SLOTS),
            "slot_weekday": (7, grids.SLOTS),
            "time_state": (FRAUD_STATES, grids.TIME_CLASSES),
            "slot_state": (FRAUD_STATES, grids.SLOTS),
            "known_time.weight": (z, TIME_INPUTS),
            "known_hidden.weight": (z, h),
            "known_hidden.bias": (z,),
            "fraud.weight": (1, z),
            "fraud.bias": (1,),
            "fraud_state": (FRAUD_STATES,),
            "fraud_slot": (grids.SLOTS,),
            "fraud_rate": (1,),
            "merchant.weight": (self.merchants, z),
            "merchant.bias": (self.merchants,),
            "merchant_fraud": (self.merchants,),
            "spent.weight": (z, z),
            "spent.bias": (z,),
            "spent_fraud": (FRAUD_CLASSES, z),
            "spent_merchant": (self.merchants, z),
            "spent_group": (self.groups, z),
            "amount.weight": (self.amounts, z),
            "amount.bias": (self.amounts,),
            "amount_group": (FRAUD_CLASSES * self.groups, self.amounts),
        }
        for number, classes in enumerate(self.fields):
            shapes[f"field_{number}.weight"] = (classes, z)
            shapes[f"field_{number}.bias"] = (classes,)
            shapes[f"field_{number}_amount"] = (self.amounts, classes)
        return shapes
