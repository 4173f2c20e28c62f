"""The network in NumPy: it unrolls the histories of many accounts at once, a step at a time.

Matrix products run in tiles of the same shape. So the result of a row does not depend on the rows
beside it, and the same seed gives the same histories in batches of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.generator import grids
from model.generator.draws import Keys, keys_of, normal, uniform
from model.generator.fields import GeneratedField
from model.generator.generator import Generator
from model.generator.lessons import OTHER_DAY, SAME_DAY
from model.generator.memory import Memory, Step
from model.generator.profiles import AT
from model.generator.sizes import GeneratorSizes
from model.generator.world import (
    ACCOUNT_FRAUD,
    LEGITIMATE_CLASS,
    MERCHANT_FRAUD,
    OVER_LIMIT,
    REACH_MAX,
)
from model.units import DAY_MS

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Rows = NDArray[np.intp]
Draw = Callable[[int], Floats]

TILE_ROWS = 256
"""Rows of a matrix product. More gain nothing, and few accounts fill fewer."""

TOWN_ACCOUNTS = 1000
"""About the number of accounts that share a neighbourhood of local merchants."""

HOME_CANDIDATES = 8
"""Places of which an account's home is chosen."""

PERIOD_DAYS = 120
"""Period in which a merchant is compromised at most once; longer than any compromise."""
_PERIOD_MS = PERIOD_DAYS * DAY_MS

_ACCOUNT_STREAM, _MERCHANT_STREAM = 1, 2
_PLACE, _FIELDS_OF_OWNER = 1 << 40, 1 << 41  # steps apart from those of transactions

# Purposes of the draws of a step.
_TIME, _WITHIN, _DAY, _SLOT, _FRAUD, _KIND, _RANK, _HUB = range(8)
_COMPROMISED, _BIN, _AMOUNT, _EPISODE = 8, 9, 10, 11
_FIELD = 16


class NumpyNetwork:
    """The weights of a generator's network.

    Args:
        sizes: sizes of the network.
        weights: by name; see :meth:`model.generator.sizes.GeneratorSizes.tensor_shapes`.
    """

    def __init__(self, sizes: GeneratorSizes, weights: Mapping[str, Float32]) -> None:
        self.sizes = sizes
        self._weights = weights
        self._transposed = {
            name: np.ascontiguousarray(weight.T)
            for name, weight in weights.items()
            if name.endswith(("weight", "weight_ih_l0", "weight_hh_l0"))
        }

    def table(self, name: str) -> Float32:
        """Return a table of the network."""
        return self._weights[name]

    def product(self, name: str, rows: Float32, bias: str | None = None) -> Float32:
        """Multiply rows [n, K], n a multiple of TILE_ROWS, by a weight; add a bias."""
        weight = self._transposed[name]
        out = np.empty((len(rows), weight.shape[1]), np.float32)
        for begin in range(0, len(rows), TILE_ROWS):
            tile = slice(begin, begin + TILE_ROWS)
            np.matmul(rows[tile], weight, out=out[tile])
        if bias is not None:
            out += self._weights[bias]
        return out

    def step(self, inputs: Float32, hidden: Float32) -> Float32:
        """Return the hidden states [n, H] after inputs [n, I]; n is a multiple of TILE_ROWS."""
        size = self.sizes.hidden
        given = self.product("gru.weight_ih_l0", inputs, "gru.bias_ih_l0")
        kept = self.product("gru.weight_hh_l0", hidden, "gru.bias_hh_l0")
        gates = given[:, : 2 * size] + kept[:, : 2 * size]
        np.multiply(gates, 0.5, out=gates)
        np.tanh(gates, out=gates)
        gates += 1
        gates *= 0.5
        reset, update = gates[:, :size], gates[:, size:]
        new = np.tanh(given[:, 2 * size :] + reset * kept[:, 2 * size :])
        return np.asarray(new + update * (hidden - new))


def padded(rows: Float32) -> Float32:
    """Return rows [n, K] with zeros up to a multiple of TILE_ROWS."""
    missing = -len(rows) % TILE_ROWS
    return np.pad(rows, ((0, missing), (0, 0))) if missing else rows


def choose(logits: Float32, share: Floats) -> Int64:
    """Draw classes [n] by logits [n, C] and uniform numbers [n]; the logits are overwritten."""
    logits -= logits.max(1, keepdims=True)
    np.exp(logits, out=logits)
    cumulative = np.cumsum(logits, 1, dtype=np.float64)
    passed = (cumulative <= (share * cumulative[:, -1])[:, None]).sum(1)
    return np.asarray(np.minimum(passed, logits.shape[1] - 1), np.int64)


@dataclass(frozen=True)
class Cast:
    """Accounts to unroll, and the world that they live in.

    Attributes:
        seed: decides every draw.
        accounts: number of all accounts of the run.
        begin_ms, end_ms: begin and end of the histories.
    """

    seed: int
    accounts: int
    begin_ms: int
    end_ms: int

    @property
    def towns(self) -> int:
        """Number of neighbourhoods."""
        return max(1, round(self.accounts / TOWN_ACCOUNTS))


@dataclass(frozen=True)
class GeneratedTransactions:
    """Generated transactions; the columns have the same length.

    Attributes:
        account: number of the account, from 0.
        merchant: code of the merchant.
        fraud: 0 is legitimate; otherwise whose fraud it is, see :mod:`model.generator.world`.
        fields: classes of all extra fields, and the share within the class.
    """

    time_ms: Int64
    account: Int64
    merchant: Int64
    amount: Floats
    fraud: NDArray[np.int8]
    fields: NDArray[np.int8]
    shares: Float32

    @property
    def is_fraud(self) -> NDArray[np.bool_]:
        """The labels."""
        return np.asarray(self.fraud > LEGITIMATE_CLASS)

    def __len__(self) -> int:
        return len(self.time_ms)

    def at(self, rows: Rows | slice) -> GeneratedTransactions:
        """Return some of the transactions."""
        return GeneratedTransactions(*(column[rows] for column in vars(self).values()))

    @staticmethod
    def joined(parts: list[GeneratedTransactions]) -> GeneratedTransactions:
        """Join transactions in order."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return GeneratedTransactions(*(np.concatenate(column) for column in columns))


class Unroller:
    """Histories of some accounts. Each has a next transaction, drawn already.

    Args:
        generator: the generator.
        cast: the run.
        accounts: [n] numbers of the accounts.
        profiles: [n, P].
    """

    def __init__(self, generator: Generator, cast: Cast, accounts: Int64, profiles: Floats) -> None:
        self._world = world = generator.world
        self._network = NumpyNetwork(generator.header.sizes, generator.weights)
        self._cast = cast
        self.accounts = accounts
        self._keys = keys_of(cast.seed, _ACCOUNT_STREAM, accounts)
        self._fields = generator.header.fields
        self._own = [p for p, field in enumerate(self._fields) if field.owner == "transaction"]
        days = min((cast.end_ms - cast.begin_ms) / DAY_MS, world["days"])
        opened = np.clip(profiles[:, AT["opened"]], 0, 1) * days
        start_ms = cast.begin_ms + np.floor(opened * DAY_MS).astype(np.int64)
        self._memory = Memory(world, profiles, start_ms, len(self._own))
        self._hidden = np.zeros((len(accounts), generator.header.sizes.hidden), np.float32)
        self._reach_share = generator.density.share_of("reach", profiles)
        self._place_in_town()
        n = len(accounts)
        self.next_ms = np.zeros(n, np.int64)
        self._merchant = np.zeros(n, np.int32)
        self._kind = np.zeros(n, np.int64)
        self._group = np.zeros(n, np.int64)
        self._group_place = next((p for p, f in enumerate(self._fields) if f.groups), None)
        last = np.searchsorted(world.hub_groups, np.arange(world.groups), side="right")
        self._group_ends = np.concatenate(([0.0], world.hub_shares))[np.append(0, last)]
        self._group_last = last - 1
        self._rank = np.zeros(n, np.int64)
        self._fraud_class = np.zeros(n, np.int64)
        self._fraud = np.zeros(n, np.int8)
        self._left = np.zeros(n, np.int64)
        self._log_rate = profiles[:, AT["rate"]]
        self._amount = np.zeros(n)
        self._classes = np.zeros((n, len(self._fields)), np.int8)
        self._shares = np.zeros((n, len(self._fields)), np.float32)
        for place, field in enumerate(self._fields):
            if field.owner == "account":
                self._draw_of_owner(place, field, self._keys, np.arange(n))
        self._advance(np.arange(n))

    def until(self, time_ms: int, rows_at_once: int) -> list[GeneratedTransactions]:
        """Return all transactions before a time; each account's are in order."""
        taken = []
        active = np.flatnonzero(self.next_ms < time_ms)
        while len(active):
            for begin in range(0, len(active), rows_at_once):
                rows = active[begin : begin + rows_at_once]
                taken.append(self._take(rows))
                self._advance(rows)
            active = active[self.next_ms[active] < time_ms]
        return taken

    def _take(self, rows: Rows) -> GeneratedTransactions:
        """Return the next transactions of accounts, and remember them."""
        memory, scale = self._memory, self._field_scale()
        amount = self._amount[rows]
        found = GeneratedTransactions(
            self.next_ms[rows],
            self.accounts[rows],
            self._merchant[rows].astype(np.int64),
            amount,
            self._fraud[rows],
            self._classes[rows],
            self._shares[rows],
        )
        memory.observe(
            rows,
            Step(
                found.time_ms,
                self._merchant[rows],
                self._kind[rows],
                self._group[rows],
                self._merchant[rows] < self._world.hubs,
                self._rank[rows],
                self._fraud_class[rows],
                amount / memory.level[rows],
                (found.fields[:, self._own] / scale).astype(np.float32),
                self._left[rows],
            ),
        )
        return found

    def _field_scale(self) -> Float32:
        sizes = [self._fields[place].classes for place in self._own]
        return np.maximum(np.array(sizes, np.float32) - 1, 1)

    def _place_in_town(self) -> None:
        """Choose each account's stretch of local merchants, and the order of its visits."""
        cast, keys = self._cast, self._keys
        town = self.accounts * cast.towns // cast.accounts
        bounds = -(-np.arange(cast.towns + 1) * cast.accounts // cast.towns)
        merchants = np.maximum(np.diff(bounds) * self._world["local_per_account"], 1.0)
        width = np.maximum(np.round(np.sqrt(merchants)), 1).astype(np.int64)
        height = np.maximum(np.round(merchants / width), 1).astype(np.int64)
        size = width * height
        self._town_first = (self._world.hubs + np.cumsum(size) - size)[town]
        self._width, self._height = width[town], height[town]
        reach = np.minimum(np.round(self._memory.reach).astype(np.int64), size[town])
        self._stretch = np.maximum(reach, 1)
        self._memory.reach = self._stretch.astype(np.float64)
        self._stride = _coprime_strides(int(self._stretch.max(initial=1)))[self._stretch]
        x, y = self._homes()
        self._home = y * self._width + x
        self._turn = np.floor(uniform(keys, _PLACE, 1) * self._stretch).astype(np.int64)

    def _homes(self) -> tuple[Int64, Int64]:
        """Choose each account's home [n] so that its reach fits the place.

        Near the edge of a town fewer merchants are in reach, and elsewhere their number varies by
        chance. Some places at random are ordered by that. The rank of the account's reach among
        all accounts decides which one it takes, so that homes lie evenly over the town.
        """
        usual = float(np.exp(self._world.profile_mean[AT["reach"]]))
        radius = max(np.sqrt(usual / np.pi), 1.0)
        n = len(self.accounts)
        places = np.zeros((HOME_CANDIDATES, 2, n), np.int64)
        fit = np.zeros((HOME_CANDIDATES, n))
        for number in range(HOME_CANDIDATES):
            step, share = _PLACE + number, np.ones(n)
            for axis, side in enumerate((self._width, self._height)):
                at = np.floor(uniform(self._keys, step, 2 + axis) * side).astype(np.int64)
                near = np.minimum(at, side - 1 - at) / radius
                share *= _share_inside(np.minimum(near, 1.0))
                places[number, axis] = at
            fit[number] = np.log(share) + normal(self._keys, step, 4) / np.sqrt(usual)
        rank = np.minimum(self._reach_share * HOME_CANDIDATES, HOME_CANDIDATES - 1).astype(np.int64)
        chosen = np.take_along_axis(np.argsort(fit, 0, kind="stable"), rank[None], 0)[0]
        x, y = places[chosen, :, np.arange(n)].T
        return x, y

    def _local(self, rows: Rows) -> NDArray[np.int32]:
        """Return the next local merchants [m] of accounts; after all in reach, the first again.

        A town is a grid of merchants. An account reaches the places around its home, the nearest
        ones that the town has, in an order of its own.
        """
        number, stretch = self._memory.opened[rows], self._stretch[rows]
        place = (self._turn[rows] + number * self._stride[rows]) % stretch
        width, height, home = self._width[rows], self._height[rows], self._home[rows]
        x, y = home % width, home // width
        near = np.minimum(place, len(_NEAREST) - 1)
        cell_x, cell_y = x + _NEAREST[near, 0], y + _NEAREST[near, 1]
        margin = np.ceil(np.sqrt(np.maximum(stretch, place) / np.pi)).astype(np.int64) + 2
        at_edge = np.flatnonzero(
            (np.minimum(x, y) < margin) | (x + margin >= width) | (y + margin >= height)
        )
        if len(at_edge):
            found = _inside(place, x, y, width, height, at_edge)
            cell_x[at_edge], cell_y[at_edge] = found
        # Where the reach is most of the town, a walk through the town meets each place once.
        size = width * height
        wide = (4 * stretch > size) | (4 * place + 8 >= len(_NEAREST))
        cell = np.where(wide, (home + place) % size, cell_y * width + cell_x)
        return np.asarray(self._town_first[rows] + cell, np.int32)

    def _advance(self, rows: Rows) -> None:
        """Draw the next transactions of accounts."""
        memory, network, m = self._memory, self._network, len(rows)
        keys, count = self._keys[rows], memory.count[rows]

        def draw(purpose: int) -> Floats:
            return uniform(keys, count, purpose)

        hidden = network.step(padded(memory.inputs(rows)), padded(self._hidden[rows]))
        self._hidden[rows] = hidden[:m]
        time_ms = self._draw_time(rows, hidden, draw)
        self.next_ms[rows] = time_ms
        going = np.flatnonzero(time_ms < self._cast.end_ms)
        if len(going) < m:  # the others have no further transaction
            rows, hidden, time_ms = rows[going], padded(hidden[going]), time_ms[going]
            keys, count, m = keys[going], count[going], len(going)
        if not m:
            return
        z = network.product("known_hidden.weight", hidden, "known_hidden.bias")
        time_inputs = padded(memory.time_inputs(rows, time_ms))
        z += network.product("known_time.weight", time_inputs)
        np.maximum(z, 0, out=z)
        at = memory.fraud_state(rows, time_ms)
        odds = network.product("fraud.weight", z, "fraud.bias")[:m, 0]
        odds += memory.fraud_baseline(rows, time_ms).astype(np.float32)
        odds += network.table("fraud_state")[at]
        odds += network.table("fraud_slot")[time_ms % DAY_MS // grids.SLOT_MS]
        odds += network.table("fraud_rate") * time_inputs[:m, -1]
        odds = odds.astype(np.float64)
        fraud = draw(_FRAUD) < 1 / (1 + np.exp(-odds))
        fraud_class = np.where(fraud & memory.defrauded[rows], ACCOUNT_FRAUD, LEGITIMATE_CLASS)
        merchant = self._draw_merchant(rows, z, fraud_class, draw)
        stolen = self._is_compromised(merchant, time_ms, draw(_COMPROMISED))
        fraud_class = np.where(stolen & (fraud_class == 0), MERCHANT_FRAUD, fraud_class)
        y = network.product("spent.weight", z, "spent.bias")
        y[:m] += network.table("spent_fraud")[fraud_class]
        y[:m] += network.table("spent_merchant")[self._kind[rows]]
        group = self._group[rows]
        y[:m] += network.table("spent_group")[group]
        np.maximum(y, 0, out=y)
        logits = network.product("amount.weight", y, "amount.bias")[:m]
        logits += network.table("amount_group")[fraud_class * self._world.groups + group]
        amount_bin = choose(logits, draw(_BIN))
        amount = self._world.amounts(amount_bin, draw(_AMOUNT), memory.level[rows])
        self._amount[rows] = amount
        self._fraud_class[rows] = fraud_class
        if self._world.plans_episodes:
            left = memory.frauds_left(rows, time_ms)
            begun = self._world.episode_sizes_of(self._log_rate[rows], draw(_EPISODE))
            self._left[rows] = np.where(left > 0, left, begun) - 1
        over = (fraud_class == LEGITIMATE_CLASS) & (amount > self._world["certain"])
        self._fraud[rows] = np.where(over, OVER_LIMIT, fraud_class)
        self._draw_fields(rows, y, amount_bin, merchant, draw)

    def _draw_time(self, rows: Rows, hidden: Float32, draw: Draw) -> Int64:
        network, memory, m = self._network, self._memory, len(rows)
        edges, base = memory.time_baseline(rows)
        logits = network.product("time.weight", hidden, "time.bias")[:m]
        logits += base
        state = memory.fraud_state(rows, memory.last_ms[rows])
        logits += network.table("time_state")[state]
        kind = choose(logits, draw(_TIME))
        last, within = memory.last_ms[rows], draw(_WITHIN)
        low = edges[np.arange(m), kind]
        high = edges[np.arange(m), kind + 1]
        time_ms = low + np.floor(within * (high - low)).astype(np.int64)
        long = np.flatnonzero(kind >= grids.TODAY)
        if len(long):
            first_day, after = grids.day_range(kind[long])
            days = first_day + np.floor(draw(_DAY)[long] * (after - first_day)).astype(np.int64)
            day_ms = last[long] - last[long] % DAY_MS + days * DAY_MS
            begin, end = grids.slot_bounds(last[long] + grids.SHORT_EDGES_MS[-1], day_ms)
            slots = network.product("slot.weight", padded(hidden[long]))[: len(long)]
            slots += memory.slot_baseline(rows[long], begin, end)
            slots += network.table("slot_day")[np.where(days == 0, SAME_DAY, OTHER_DAY)]
            slots += network.table("slot_weekday")[grids.weekday_of(day_ms)]
            slots += network.table("slot_state")[state[long]]
            slot = choose(slots, draw(_SLOT)[long])
            at = np.arange(len(long))
            low, high = begin[at, slot], end[at, slot]
            time_ms[long] = low + np.floor(within[long] * (high - low)).astype(np.int64)
        resolution = round(self._world["resolution_ms"])
        return np.asarray(np.maximum(time_ms - time_ms % resolution, last))

    def _draw_merchant(
        self, rows: Rows, z: Float32, fraud_class: Int64, draw: Draw
    ) -> NDArray[np.int32]:
        memory, m = self._memory, len(rows)
        logits = self._network.product("merchant.weight", z, "merchant.bias")[:m]
        logits += self._network.table("merchant_fraud") * (fraud_class == ACCOUNT_FRAUD)[:, None]
        logits += memory.merchant_baseline(rows)
        kind = choose(logits, draw(_KIND))
        visited = memory.visited[rows]
        old = kind < grids.RANK_CLASSES
        low = grids.RANK_EDGES[np.minimum(kind, grids.RANK_CLASSES - 1)]
        high = np.minimum(visited, grids.RANK_EDGES[np.minimum(kind, grids.RANK_CLASSES - 1) + 1])
        rank = low + np.floor(draw(_RANK) * (high - low)).astype(np.int64)
        rank = np.where(old, rank, -1)
        merchant = np.where(old, memory.recent[rows, np.maximum(rank, 0)], 0).astype(np.int32)
        local = np.flatnonzero(kind == grids.NEW_LOCAL)
        merchant[local] = self._local(rows[local])
        again = local[memory.opened[rows[local]] >= self._stretch[rows[local]]]
        if len(again):  # most are forgotten, as the list of recent ones is bounded
            found = memory.rank_of(rows[again], merchant[again])
            rank[again] = found
            kind[again] = np.where(found < 0, grids.NEW_LOCAL, grids.rank_class_of(found))
        hub = np.flatnonzero(kind >= grids.HUB)
        if len(hub):
            group, share = kind[hub] - grids.HUB, draw(_HUB)[hub]
            low, high = self._group_ends[group], self._group_ends[group + 1]
            share = low + share * (high - low)
            drawn = np.searchsorted(self._world.hub_shares, share, side="right")
            merchant[hub] = np.minimum(drawn, self._group_last[group])
            found = memory.rank_of(rows[hub], merchant[hub])
            rank[hub] = found
            kind[hub] = np.where(found < 0, kind[hub], grids.rank_class_of(found))
        self._merchant[rows], self._kind[rows], self._rank[rows] = merchant, kind, rank
        self._group[rows] = self._group_of(merchant)
        return merchant

    def _group_of(self, merchant: NDArray[np.int32]) -> Int64:
        """Return the groups of merchants [m]."""
        world, place = self._world, self._group_place
        if place is None:
            return np.zeros(len(merchant), np.int64)
        group = np.zeros(len(merchant), np.int64)
        is_hub = merchant < world.hubs
        group[is_hub] = world.hub_groups[merchant[is_hub]]
        local = np.flatnonzero(~is_hub)
        keys = keys_of(self._cast.seed, _MERCHANT_STREAM, merchant[local])
        share = uniform(keys, _FIELDS_OF_OWNER + place, 0)
        group[local] = self._fields[place].drawn(share)
        return group

    def _is_compromised(
        self, merchant: NDArray[np.int32], time_ms: Int64, share: Floats
    ) -> NDArray[np.bool_]:
        """Return whether transactions are frauds of a compromised merchant."""
        world = self._world
        hub = merchant < world.hubs
        starts = np.where(hub, world["hub_compromises"], world["compromises"]) * PERIOD_DAYS
        likely = np.where(hub, world["hub_compromise_share"], world["compromise_share"])
        found = np.zeros(len(merchant), np.bool_)
        if not starts.any():
            return found
        keys = keys_of(self._cast.seed, _MERCHANT_STREAM, merchant)
        grid = np.linspace(0, 1, len(world.durations))
        period = (time_ms - self._cast.begin_ms) // _PERIOD_MS + 1
        now = (time_ms - self._cast.begin_ms) / DAY_MS + PERIOD_DAYS
        for number in (period - 1, period):  # one that began in the period before may go on
            begin = (number + uniform(keys, number, 1)) * PERIOD_DAYS
            end = begin + np.interp(uniform(keys, number, 2), grid, world.durations)
            found |= (uniform(keys, number, 0) < starts) & (begin <= now) & (now < end)
        return found & (share < likely)

    def _draw_fields(
        self,
        rows: Rows,
        y: Float32,
        amount_bin: Int64,
        merchant: NDArray[np.int32],
        draw: Draw,
    ) -> None:
        m = len(rows)
        for place, field in enumerate(self._fields):
            if field.owner == "merchant":
                keys = keys_of(self._cast.seed, _MERCHANT_STREAM, merchant)
                self._draw_of_owner(place, field, keys, rows, self._group[rows])
                if field.groups:
                    self._classes[rows, place] = self._group[rows]
        for number, place in enumerate(self._own):
            name = f"field_{number}"
            logits = self._network.product(f"{name}.weight", y, f"{name}.bias")[:m]
            logits += self._network.table(f"{name}_amount")[amount_bin]
            logits[:, self._fields[place].unseen] = grids.IMPOSSIBLE
            self._classes[rows, place] = choose(logits, draw(_FIELD + 2 * place))
            self._shares[rows, place] = draw(_FIELD + 2 * place + 1)

    def _draw_of_owner(
        self,
        place: int,
        field: GeneratedField,
        keys: Keys,
        rows: Rows,
        group: Int64 | None = None,
    ) -> None:
        step = _FIELDS_OF_OWNER + place
        self._classes[rows, place] = field.drawn(uniform(keys, step, 0), group)
        self._shares[rows, place] = uniform(keys, step, 1)


def _share_inside(distance: Floats) -> Floats:
    """Return the share [n] of a disc on its centre's side of a line, at a distance of 0 to 1."""
    return np.asarray(1 - (np.arccos(distance) - distance * np.sqrt(1 - distance**2)) / np.pi)


def _inside(
    place: Int64, x: Int64, y: Int64, width: Int64, height: Int64, rows: Rows
) -> tuple[Int64, Int64]:
    """Return the places [m] in the order of nearness among those within the town."""
    most = min(int(4 * place[rows].max() + 8), len(_NEAREST))
    cell_x = x[rows, None] + _NEAREST[:most, 0]
    cell_y = y[rows, None] + _NEAREST[:most, 1]
    inside = (cell_x >= 0) & (cell_x < width[rows, None])
    inside &= (cell_y >= 0) & (cell_y < height[rows, None])
    passed = np.cumsum(inside, 1) > place[rows, None]
    chosen, at = passed.argmax(1), np.arange(len(rows))
    # A town with too few places: whatever is nearest, moved inside.
    found_x = np.clip(cell_x[at, chosen], 0, width[rows] - 1)
    return found_x, np.clip(cell_y[at, chosen], 0, height[rows] - 1)


def _coprime_strides(most: int) -> Int64:
    """Return for each length up to ``most`` a stride that visits every place of it.

    >>> _coprime_strides(6).tolist()
    [1, 1, 1, 2, 3, 3, 5]
    """
    length = np.arange(most + 1)
    strides = np.ones(most + 1, np.int64)
    found = length < 3
    start = np.round(length * 0.618).astype(np.int64)
    for step in range(most + 1):
        candidate = start + step
        fits = ~found & (np.gcd(candidate, np.maximum(length, 1)) == 1)
        strides[fits] = candidate[fits]
        found |= fits
        if found.all():
            break
    return strides


def _nearest_places(count: int) -> Int64:
    """Return the offsets [count, 2] of the places of a grid, the nearest first."""
    side = np.arange(-int(np.sqrt(count)), int(np.sqrt(count)) + 1)
    x, y = (axis.ravel() for axis in np.meshgrid(side, side))
    order = np.lexsort((np.arctan2(y, x), x**2 + y**2))[:count]
    return np.stack((x[order], y[order]), 1)


_NEAREST = _nearest_places(4 * REACH_MAX + 8)
