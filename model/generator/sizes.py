"""Sizes of the generator's network, and the shapes of its weights."""

from __future__ import annotations

import msgspec

from model.generator import grids
from model.generator.memory import TIME_INPUTS

FRAUD_CLASSES = 3


class GeneratorSizes(msgspec.Struct, frozen=True):
    """Sizes of the network."""

    inputs: int
    hidden: int
    head: int
    amounts: int
    fields: list[int] = []
    """Classes of each field."""

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
            "known_time.weight": (z, TIME_INPUTS),
            "known_hidden.weight": (z, h),
            "known_hidden.bias": (z,),
            "fraud.weight": (1, z),
            "fraud.bias": (1,),
            "merchant.weight": (grids.MERCHANT_CLASSES, z),
            "merchant.bias": (grids.MERCHANT_CLASSES,),
            "merchant_fraud": (2, grids.MERCHANT_CLASSES),
            "spent.weight": (z, z),
            "spent.bias": (z,),
            "spent_fraud": (FRAUD_CLASSES, z),
            "spent_merchant": (grids.MERCHANT_CLASSES, z),
            "amount.weight": (self.amounts, z),
            "amount.bias": (self.amounts,),
        }
        for number, classes in enumerate(self.fields):
            shapes[f"field_{number}.weight"] = (classes, z)
            shapes[f"field_{number}.bias"] = (classes,)
            shapes[f"field_{number}_amount"] = (self.amounts, classes)
        return shapes
