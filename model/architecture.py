"""The sizes of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from model.features.spec import Role, payment_columns

SIZE_MAX = 4096
"""Largest size of any layer."""

LAYERS_MAX = 8
"""Most recurrent layers."""

EMBEDDINGS_MAX = 64
"""Most embedded categories."""

VOCABULARY_MAX = 100_000
"""Most codes of one category."""

MERCHANT_WEIGHT_SIZE = 32
"""Hidden units of the merchant weight network."""

SLOPE_LOG_MAX = 4.0
"""Bound of the logarithm of a category's slope."""

Cell = Literal["gru", "lstm", "rnn", "none"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a :class:`model.network.Network`.

    Attributes:
        inputs: number of numeric inputs; the codes of ``embeddings`` follow them.
        cell: recurrent layer; ``none`` makes a feed-forward network of one transaction.
        embeddings: number of codes and size of the vectors of each category.
        rising_size: units of the part that rises with the amount, and of the part that rises with
            known frauds; even.
        roles: role of each input; empty: all are ``own``.
        category_slopes: whether each category has slopes of its own for the units that rise with
            the amount. Older checkpoints have no such field.

    Raises:
        ValueError: a size is out of bounds; the message names it.
    """

    inputs: int
    input_size: int = 64
    hidden_size: int = 128
    layers: int = 1
    head_size: int = 64
    dropout: float = 0.1
    cell: Cell = "gru"
    embeddings: tuple[tuple[int, int], ...] = ()
    rising_size: int = 32
    roles: tuple[Role, ...] = ()
    category_slopes: bool = False

    def __post_init__(self) -> None:
        if not self.roles:
            object.__setattr__(self, "roles", ("own",) * self.inputs)
        if len(self.roles) != self.inputs:
            raise ValueError(f"{len(self.roles)} roles for {self.inputs} inputs")
        self._check_sizes()
        if self.cell not in get_args(Cell):
            raise ValueError(
                f"cell is {self.cell!r}; it must be one of {', '.join(get_args(Cell))}"
            )
        if len(self.embeddings) > EMBEDDINGS_MAX:
            raise ValueError(f"{len(self.embeddings)} embeddings; at most {EMBEDDINGS_MAX}")
        for codes, size in self.embeddings:
            if not (1 <= codes <= VOCABULARY_MAX and 1 <= size <= SIZE_MAX):
                raise ValueError(
                    f"an embedding of {codes} codes in vectors of {size}; at most "
                    f"{VOCABULARY_MAX} and {SIZE_MAX}"
                )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a GRU network, as a checkpoint stores it."""
        width = self.inputs + sum(size for _, size in self.embeddings)
        h, x, m = self.hidden_size, self.input_size, self.rising_size
        embeddings = {f"embeddings.{i}.weight": sizes for i, sizes in enumerate(self.embeddings)}
        slopes = {
            f"slopes.{i}.weight": (codes, m)
            for i, (codes, _) in enumerate(self.embeddings)
            if self.category_slopes
        }
        layers = {
            f"recurrent.{name}_l{layer}": shape
            for layer in range(self.layers)
            for name, shape in (
                ("weight_ih", (3 * h, h if layer else x)),
                ("weight_hh", (3 * h, h)),
                ("bias_ih", (3 * h,)),
                ("bias_hh", (3 * h,)),
            )
        }
        payment = max(1, len(payment_columns(self.roles)))
        return {
            **embeddings,
            **slopes,
            "input_layer.weight": (x, width),
            "input_layer.bias": (x,),
            **layers,
            "free_layer.weight": (x, width),
            "free_layer.bias": (x,),
            "head.weight": (self.head_size + 2 * m, h + x),
            "head.bias": (self.head_size + 2 * m,),
            "amount_layer.weight": (m, width),
            "fraud_layer.weight": (m, width),
            "logit.weight": (1, self.head_size),
            "logit.bias": (1,),
            "amount_logit.weight": (1, m),
            "fraud_logit.weight": (1, m),
            "own.rest": (1,),
            "own.hidden.weight": (MERCHANT_WEIGHT_SIZE, payment),
            "own.hidden.bias": (MERCHANT_WEIGHT_SIZE,),
            "own.explained.weight": (1, MERCHANT_WEIGHT_SIZE),
            "own.explained.bias": (1,),
            "verdict.weight": (1, h),
            "verdict.bias": (1,),
        }

    def _check_sizes(self) -> None:
        for name in ("inputs", "input_size", "hidden_size", "head_size", "rising_size"):
            if not 1 <= getattr(self, name) <= SIZE_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 to {SIZE_MAX}")
        if self.rising_size % 2:
            raise ValueError(f"rising_size is {self.rising_size}; it must be even")
        if not 1 <= self.layers <= LAYERS_MAX:
            raise ValueError(f"layers is {self.layers}; it must be 1 to {LAYERS_MAX}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be 0 up to, but not, 1")
