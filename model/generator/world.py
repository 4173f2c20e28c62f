"""MeasuredLog facts of the training data that every history shares: rhythm, merchants, amounts.

local merchant  one that few accounts reach; a new account gets a place among them
hub             one that many accounts reach, such as an online shop
group           of merchants, by a field of theirs that says most about amounts, such as a category
compromise      days in which a share of a merchant's payments is fraud, whoever pays
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.data.dataset import FRAUD, Dataset
from model.generator.episodes import draw_size, find_episodes
from model.generator.grids import SLOT_MS, SLOTS, weekday_of
from model.generator.profiles import AT, PROFILE
from model.generator.times_by_code import TimesByCode
from model.units import DAY_MS, HOUR_MS

Floats = NDArray[np.float64]
Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEGITIMATE_CLASS, ACCOUNT_FRAUD, MERCHANT_FRAUD, OVER_LIMIT = 0, 1, 2, 3
"""Classes of a transaction: whose the fraud is, or that no legitimate amount is as large."""

FRAUD_GAP_DAYS = 14.0
"""Longest gap between two frauds of one compromise of a merchant."""
COMPROMISE_FRAUDS_MIN = 2
COMPROMISE_SHARE_MIN = 0.5
ELSEWHERE_SHARE_MAX = 0.1
"""Most of its accounts' payments elsewhere that are fraud while a merchant is compromised.

A thief on an account pays at several merchants. Without this bound clusters need two accounts, and
of 400 accounts of the Handbook's data no compromise was told from chance."""
CHANCE_SHARE_MAX = 0.5
"""Most frauds that a random order of the frauds' merchants puts in compromises, beside the data."""
DURATION_MAX_DAYS = 110.0
DURATION_FRAUDS_MIN = 4
"""Fewest frauds of a compromise that tell its duration."""

HUB_ACCOUNTS_MIN = 30
HUB_FACTOR = 6.0
"""A merchant is a hub from this multiple of the usual number of accounts on."""
HUB_SPREAD_LEAST = 0.7
"""A merchant is a hub, too, if its visitors are at least this share of what chance makes them."""
HUB_SPREAD_VISITS = 20
"""Fewest visits that tell whether a merchant's visitors are there by chance."""
HUB_SPREAD_ACCOUNTS = 5
HUBS_MAX = 20_000

CONCENTRATION_MAX = 1e5
"""Concentration of the groups from which on all accounts have the same shares."""

REACH_MAX = 1500
REACHES_WHOLE = 150
"""Reaches up to this one are told apart to the merchant, larger ones to a few in a hundred."""
RATIO_QUANTILES = 47
FRAUD_QUANTILES = 16
DURATION_QUANTILES = 17
TAIL_CAP = 3.0
"""Most that an amount exceeds the training's largest ratio to its level, as a factor."""

_REACHES = np.unique(
    np.append(
        np.arange(1, REACHES_WHOLE + 1),
        np.round(np.geomspace(REACHES_WHOLE, REACH_MAX, 150)).astype(np.int64),
    )
)
_LATE_DAYS = 14.0
_UPPER_SHARES = (0.99, 0.994, 0.997, 0.9985, 0.9993, 0.9997, 0.9999)


@dataclass(frozen=True)
class SharedWorld:
    """Facts that every generated history shares.

    Attributes:
        rhythm: [7 * SLOTS + 1] integral of the weekly rhythm, 0 to 7 average days.
        ratio_edges: [A + 1] edges of amounts relative to the account's level.
        numbers: see :data:`NUMBERS`.
        hub_shares: [H] cumulative shares of the hubs' transactions, group by group.
        hub_groups: [H] their groups, in ascending order.
        group_shares: [G] shares of the groups at hubs.
        durations: [17] quantiles of the days of a merchant's compromise.
        profile_mean, profile_scale: [P] to standardize profiles.
        episode_slope, episode_sizes, episode_rhythm: see
            :class:`model.generator.episodes.Episodes`. Generators of format 2 have none.
    """

    rhythm: Floats
    ratio_edges: Floats
    numbers: Floats
    hub_shares: Floats
    hub_groups: Floats
    group_shares: Floats
    durations: Floats
    profile_mean: Floats
    profile_scale: Floats
    episode_slope: Floats = field(default_factory=lambda: np.zeros(0))
    episode_sizes: Floats = field(default_factory=lambda: np.zeros(0))
    episode_rhythm: Floats = field(default_factory=lambda: np.zeros(0))

    def __getitem__(self, name: str) -> float:
        return float(self.numbers[NUMBERS.index(name)])

    @property
    def hubs(self) -> int:
        """Number of hubs."""
        return len(self.hub_shares)

    @property
    def groups(self) -> int:
        """Number of groups of merchants."""
        return len(self.group_shares)

    @property
    def plans_episodes(self) -> bool:
        """Whether the number of frauds of an episode is drawn when it begins."""
        return len(self.episode_sizes) > 0

    def episode_sizes_of(self, rate: Floats, share: Floats) -> Int64:
        """Draw the numbers of frauds [n] of episodes, see :func:`~.episodes.draw_size`."""
        return draw_size(self.episode_slope, self.episode_sizes, rate, share)

    def tables(self) -> dict[str, Floats]:
        """Return the arrays by name."""
        names = [entry.name for entry in fields(self)]
        if not self.plans_episodes:
            names = [name for name in names if not name.startswith("episode")]
        return {name: getattr(self, name) for name in names}

    def network_profile(self, profiles: Floats) -> NDArray[np.float32]:
        """Return the network's inputs [n, P] of profiles."""
        scaled = (profiles - self.profile_mean) / self.profile_scale
        scaled[:, AT["theft"]] *= profiles[:, AT["defrauded"]]
        return np.clip(scaled, -6, 6).astype(np.float32)

    def amounts(self, ratio_bin: Int64, share: Floats, level: Floats) -> Floats:
        """Return amounts [n] within bins: uniform inside, a power law in the last one."""
        low, high = self.ratio_edges[ratio_bin], self.ratio_edges[ratio_bin + 1]
        ratio = low + share * (high - low)
        last = ratio_bin == len(self.ratio_edges) - 2
        tail = low * (1 - share) ** (-1 / self["tail"])
        ratio = np.where(last, np.minimum(tail, high * TAIL_CAP), ratio)
        decimals = round(self["decimals"])
        return np.asarray(np.maximum(np.round(ratio * level, decimals), self["least_amount"]))


NUMBERS = (
    "tail",  # exponent of the largest amounts
    "decimals",  # of amounts
    "least_amount",
    "certain",  # largest legitimate amount, if enough frauds are over it; else infinity
    "local_per_account",  # local merchants for each account
    "compromises",  # starts of a compromise for each local merchant and day
    "compromise_share",  # share of its payments that is fraud
    "hub_compromises",  # the same for hubs
    "hub_compromise_share",
    "days",  # length of the training data
    "resolution_ms",  # of times
    "group_concentration",  # the larger, the more equal are the accounts' shares of the groups
)


@dataclass(frozen=True)
class MeasuredLog:
    """The training data as the generator sees them.

    Attributes:
        fraud_class: [N] whose the fraud is.
        is_hub: [merchants].
        group: [merchants] from 0.
        hub_share: [merchants] share of a hub in its group's visits.
        profiles: [accounts, P].
        start_ms: [accounts] when the account's history begins.
        frauds_left: [N] frauds that follow in the episode of each fraud on an account.
    """

    world: SharedWorld
    fraud_class: NDArray[np.int8]
    is_hub: Bools
    group: Int64
    hub_share: Floats
    profiles: Floats
    start_ms: Int64
    frauds_left: Int64


def measure(log: Dataset, seed: int, group: Int64 | None = None, groups: int = 1) -> MeasuredLog:
    """Measure the world and each account's profile.

    Args:
        log: its accounts have the codes 0, 1, 2 ... without gaps.
        seed: decides what is drawn where the data are silent.
        group: [merchants] groups of the merchants. None: there is one.
        groups: number of groups.
    """
    rng = np.random.default_rng(seed)
    accounts = int(log.account.max()) + 1
    merchants = int(log.merchant.max()) + 1
    is_hub = _hubs(log, accounts, merchants)
    fraud_class, numbers, durations = _compromises(log, is_hub, rng)
    first_ms = int(log.timestamp_ms[0]) // DAY_MS * DAY_MS
    days = (int(log.timestamp_ms[-1]) - first_ms) / DAY_MS
    numbers["days"] = days
    numbers["resolution_ms"] = 1000 if np.all(log.timestamp_ms % 1000 == 0) else 1
    numbers["local_per_account"] = max((~is_hub).sum(), 1) / accounts
    numbers["decimals"] = _decimals(log.amount)
    numbers["least_amount"] = float(log.amount.min())
    profiles, start_ms = _profiles(log, accounts, fraud_class, is_hub, first_ms, days, rng)
    ratio = log.amount / np.exp(profiles[log.account, AT["level"]])
    edges, numbers["tail"] = _ratio_edges(ratio, fraud_class)
    numbers["certain"] = _certain(log)
    group = np.zeros(merchants, np.int64) if group is None else group
    own = fraud_class != ACCOUNT_FRAUD
    visits = np.bincount(log.merchant[own & is_hub[log.merchant]], minlength=merchants) + 0.5
    visits[~is_hub] = 0
    in_group = np.bincount(group, visits, groups)
    order = np.lexsort((-visits, group))
    order = order[is_hub[order]]
    numbers["group_concentration"] = _concentration(log, own & is_hub[log.merchant], group, groups)
    rhythm = _rhythm(log.timestamp_ms)
    rate = profiles[:, AT["rate"]]
    episodes = find_episodes(log, fraud_class == ACCOUNT_FRAUD, rate, rhythm, rng)
    shown = profiles.copy()
    world = SharedWorld(
        rhythm=rhythm,
        ratio_edges=edges,
        numbers=np.array([numbers[name] for name in NUMBERS]),
        hub_shares=np.cumsum(visits[order]) / max(visits.sum(), 1),
        hub_groups=group[order].astype(np.float64),
        group_shares=in_group / in_group.sum() if in_group.sum() else np.full(groups, 1 / groups),
        durations=durations,
        profile_mean=shown.mean(0),
        profile_scale=np.maximum(shown.std(0), 0.05),
        episode_slope=episodes.slope,
        episode_sizes=episodes.sizes,
        episode_rhythm=episodes.rhythm,
    )
    hub_share = visits / np.maximum(in_group[group], 1e-9)
    return MeasuredLog(
        world, fraud_class, is_hub, group, hub_share, profiles, start_ms, episodes.left
    )


def _rhythm(time_ms: Int64) -> Floats:
    """Return the integral of the weekly rhythm, smoothed over the weekdays if data are few."""
    slot = weekday_of(time_ms) * SLOTS + time_ms % DAY_MS // SLOT_MS
    counts = np.bincount(slot, minlength=7 * SLOTS).reshape(7, SLOTS).astype(float)
    by_slot = counts.sum(0) / counts.sum()
    prior = 20.0
    shape = (counts + prior * SLOTS * by_slot) / (counts.sum(1, keepdims=True) + prior * SLOTS)
    weekdays = (counts.sum(1) + 50) / (counts.sum() + 350) * 7
    mass = np.maximum(shape * weekdays[:, None], 1e-7).ravel()
    mass *= 7 / mass.sum()
    return np.concatenate(([0.0], np.cumsum(mass)))


def _hubs(log: Dataset, accounts: int, merchants: int) -> Bools:
    """Return which merchants [merchants] are hubs, by the accounts that reach them."""
    pairs = np.unique(log.merchant.astype(np.int64) * accounts + log.account)
    reached = np.bincount(pairs // accounts, minlength=merchants)
    usual = np.median(reached[reached > 0])
    least = max(HUB_FACTOR * usual, usual + 8 * np.sqrt(usual), HUB_ACCOUNTS_MIN)
    # If half of the transactions are at merchants that a tenth of all accounts reach, those are
    # the usual ones, and the rest is rare.
    wide = reached > max(HUB_ACCOUNTS_MIN, 0.1 * accounts)
    is_hub = (reached >= least) | wide | _without_regulars(log, reached, accounts)
    if is_hub.sum() > HUBS_MAX:
        is_hub &= reached >= np.sort(reached)[-HUBS_MAX]
    return np.asarray(is_hub)


def _without_regulars(log: Dataset, reached: Int64, accounts: int) -> Bools:
    """Return which merchants [merchants] are visited as if every account came by chance.

    A local merchant has regulars, so fewer different accounts make its visits.
    """
    visits = np.bincount(log.merchant, minlength=len(reached))
    sizes, count = np.unique(np.bincount(log.account, minlength=accounts), return_counts=True)
    number, place = np.unique(visits, return_inverse=True)
    missed = np.exp(number[:, None] * np.log1p(-sizes / (len(log) + 1))[None, :])
    by_chance = ((1 - missed) * count).sum(1)[place]
    known = (visits >= HUB_SPREAD_VISITS) & (reached >= HUB_SPREAD_ACCOUNTS)
    return np.asarray(known & (reached >= HUB_SPREAD_LEAST * by_chance))


def _concentration(log: Dataset, rows: Bools, group: Int64, groups: int) -> float:
    """Return the concentration of the accounts' shares of the groups at hubs, by moments."""
    if groups < 2 or not rows.any():
        return CONCENTRATION_MAX
    account, chosen = log.account[rows].astype(np.int64), group[log.merchant[rows]]
    accounts = int(account.max()) + 1
    counts = np.bincount(account * groups + chosen, minlength=accounts * groups)
    table = counts.reshape(accounts, groups).astype(float)
    share = table.sum(0) / table.sum()
    there = share > 0
    n = table.sum(1)
    off = (table - n[:, None] * share)[:, there]
    square = (off**2 / share[there]).sum()
    free = there.sum() - 1
    pairs = free * (n * (n - 1)).sum()
    alike = (square - free * n.sum()) / max(pairs, 1)
    return float(np.clip(1 / max(alike, 1e-9) - 1, 0.1, CONCENTRATION_MAX))


@dataclass(frozen=True)
class _Compromise:
    """Frauds at one merchant, close in time, by accounts that have few frauds elsewhere.

    Attributes:
        rows: of the log.
        days: from the first to the last one.
        share: share of the merchant's payments between them that they are.
        whole: whether they are enough to tell the duration, and ended before the log did.
    """

    rows: Int64
    days: float
    share: float
    whole: bool


def _compromises(
    log: Dataset, is_hub: Bools, rng: np.random.Generator
) -> tuple[NDArray[np.int8], dict[str, float], Floats]:
    """Find the compromises of merchants, unless chance alone would make as many."""
    fraud_class = np.zeros(len(log), np.int8)
    fraud = np.flatnonzero(log.label == FRAUD)
    fraud_class[fraud] = ACCOUNT_FRAUD
    shuffled = log.merchant.copy()
    shuffled[fraud] = rng.permutation(shuffled[fraud])
    paid = _Payments(log)
    found, by_chance = _clusters(log, log.merchant, paid), _clusters(log, shuffled, paid)
    kept: dict[bool, list[_Compromise]] = {}
    for hub in (False, True):
        these, those = (
            [c for c in clusters if is_hub[merchant[c.rows[0]]] == hub]
            for clusters, merchant in ((found, log.merchant), (by_chance, shuffled))
        )
        frauds, chance = (sum(len(c.rows) for c in clusters) for clusters in (these, those))
        kept[hub] = these if chance < CHANCE_SHARE_MAX * frauds else []
        for cluster in kept[hub]:
            fraud_class[cluster.rows] = MERCHANT_FRAUD
    lengths = [c.days for c in kept[False] + kept[True] if c.whole] or [1.0]
    # Lengths are estimated from few frauds; half of the spread is the estimate's.
    quantiles = np.quantile(lengths, np.linspace(0.05, 0.95, DURATION_QUANTILES))
    middle = float(np.mean(lengths))
    numbers: dict[str, float] = {}
    for hub, name in ((False, ""), (True, "hub_")):
        these = kept[hub]
        kind = is_hub if hub else ~is_hub
        share = float(np.mean([c.share for c in these])) if these else 1.0
        visits = max(int(kind[log.merchant].sum()), 1)
        frauds = sum(len(c.rows) for c in these)
        # As many starts as make the expected share of frauds that of the data.
        numbers[f"{name}compromises"] = frauds / visits / share / middle
        numbers[f"{name}compromise_share"] = share
    return fraud_class, numbers, np.minimum(middle + 0.5 * (quantiles - middle), DURATION_MAX_DAYS)


def _clusters(log: Dataset, merchants: NDArray[np.int32], paid: _Payments) -> list[_Compromise]:
    """Return the clusters of frauds at the merchants [N] of the transactions."""
    fraud = np.flatnonzero(log.label == FRAUD)
    order = fraud[np.lexsort((log.timestamp_ms[fraud], merchants[fraud]))]
    time, merchant = log.timestamp_ms[order], merchants[order]
    cut = np.ones(len(order), np.bool_)
    cut[1:] = (np.diff(merchant) != 0) | (np.diff(time) > FRAUD_GAP_DAYS * DAY_MS)
    visits, last_ms = TimesByCode(merchants, log.timestamp_ms), int(log.timestamp_ms[-1])
    low, high = visits.place(merchant, time), visits.place(merchant, time, "right")
    found = []
    for begin, end in zip(np.flatnonzero(cut), [*np.flatnonzero(cut)[1:], len(order)], strict=True):
        rows = order[begin:end]
        if len(rows) < COMPROMISE_FRAUDS_MIN or paid.fraud_elsewhere(rows) > ELSEWHERE_SHARE_MAX:
            continue
        share = (end - begin) / max(high[end - 1] - low[begin], 1)
        if share < COMPROMISE_SHARE_MIN:
            continue
        count = end - begin
        days = (time[end - 1] - time[begin]) / DAY_MS * (count + 1) / (count - 1)
        whole = time[end - 1] < last_ms - FRAUD_GAP_DAYS * DAY_MS and count >= DURATION_FRAUDS_MIN
        found.append(_Compromise(rows, float(days), float(share), bool(whole)))
    return found


class _Payments:
    """The payments of a log account by account."""

    def __init__(self, log: Dataset) -> None:
        self._log = log
        self._times = TimesByCode(log.account, log.timestamp_ms)
        self._frauds = np.concatenate(([0], np.cumsum(log.label[self._times.row] == FRAUD)))

    def fraud_elsewhere(self, rows: Int64) -> float:
        """Return the share of frauds among the payments of the rows' accounts in their time.

        The rows themselves, frauds at one merchant, do not count.
        """
        account = np.unique(self._log.account[rows])
        time_ms = self._log.timestamp_ms[rows]
        low = self._times.place(account, time_ms.min())
        high = self._times.place(account, time_ms.max(), "right")
        others = int((high - low).sum()) - len(rows)
        frauds = int((self._frauds[high] - self._frauds[low]).sum()) - len(rows)
        return frauds / max(others, 1)


def _decimals(amount: Floats) -> int:
    for decimals in (0, 1, 2):
        if np.mean(np.abs(amount - np.round(amount, decimals)) < 1e-6) > 0.999:
            return decimals
    return 2


def _certain(log: Dataset) -> float:
    """Return the largest legitimate amount if frauds lie thickly above it, else infinity."""
    legitimate = log.amount[log.label != FRAUD]
    if not len(legitimate):
        return float("inf")
    most = float(legitimate.max())
    near = (log.amount > most) & (log.amount < 1.1 * most)
    below = (log.amount > 0.9 * most) & (log.amount <= most) & (log.label != FRAUD)
    return most if near.sum() >= 20 and below.sum() >= 20 else float("inf")


def _ratio_edges(ratio: Floats, fraud_class: NDArray[np.int8]) -> tuple[Floats, float]:
    usual, stolen = ratio[fraud_class != ACCOUNT_FRAUD], ratio[fraud_class == ACCOUNT_FRAUD]
    points = [np.quantile(usual, np.linspace(0, 1, RATIO_QUANTILES))]
    points.append(np.quantile(usual, [0.003, 0.008, *_UPPER_SHARES]))
    if len(stolen) >= FRAUD_QUANTILES:
        points.append(np.quantile(stolen, np.linspace(0.03, 0.97, FRAUD_QUANTILES)))
    high = np.quantile(ratio, 1 - min(100, len(ratio) / 500) / len(ratio))
    edges = np.unique(np.concatenate(points))
    edges = edges[edges < high]
    kept = [0.0]
    for edge in edges:
        if edge > kept[-1] * 1.01 + 1e-4:
            kept.append(float(edge))
    tail = ratio[ratio > high]
    excess = np.log(tail / high).mean() if len(tail) else 0.2
    return np.array([*kept, float(high), float(ratio.max())]), float(1 / np.clip(excess, 0.02, 2.0))


def _profiles(
    log: Dataset,
    accounts: int,
    fraud_class: NDArray[np.int8],
    is_hub: Bools,
    first_ms: int,
    days: float,
    rng: np.random.Generator,
) -> tuple[Floats, Int64]:
    account = log.account

    def mean_of(values: Any, where: Bools | None = None, default: float = 0.0) -> Floats:
        rows = slice(None) if where is None else where
        total = np.bincount(account[rows], np.asarray(values, float)[rows], accounts)
        count = np.bincount(account[rows], minlength=accounts)
        return np.where(count > 0, total / np.maximum(count, 1), default)

    n = np.bincount(account, minlength=accounts)
    own = fraud_class != ACCOUNT_FRAUD
    usual = mean_of(log.amount, own, np.nan)
    usual = np.where(np.isnan(usual), mean_of(log.amount), usual)
    level = np.maximum(usual, 10.0 ** -_decimals(log.amount))
    ratio = log.amount / level[account]
    spread = np.sqrt(mean_of((ratio - 1) ** 2, own, 0.25))
    angle = 2 * np.pi * (log.timestamp_ms % DAY_MS) / DAY_MS
    first = np.full(accounts, np.iinfo(np.int64).max)
    np.minimum.at(first, account, log.timestamp_ms)
    opened_days = (first - first_ms) / DAY_MS
    naive = np.maximum(n, 1) / days
    late = (opened_days > _LATE_DAYS) & (opened_days > 6 / naive)
    rate = np.where(late, n / np.maximum(days - opened_days, 1.0), naive)
    head = np.minimum(rng.exponential(1, accounts), 3) / np.maximum(rate, 1e-3)
    start_days = np.where(late, np.maximum(opened_days - head, 0), 0.0)
    reach, repeats, repeats_noise = _reach(log, accounts, is_hub, rng)
    frauds = np.bincount(account[~own], minlength=accounts)
    theft = np.log(np.maximum(mean_of(ratio, ~own, 1.0), 1e-2))
    theft = _true_values(theft, 0.25 / np.maximum(frauds, 1), frauds > 0, rng)
    hit = np.flatnonzero(frauds > 0)
    silent = np.flatnonzero(frauds == 0)
    if len(hit):
        theft[silent] = theft[rng.choice(hit, len(silent))]
    order = np.lexsort((log.timestamp_ms, account))
    same = np.diff(account[order]) == 0
    short = same & (np.diff(log.timestamp_ms[order]) < HOUR_MS)
    gaps = np.bincount(account[order][1:][same], minlength=accounts)
    bursts = np.bincount(account[order][1:][short], minlength=accounts) / np.maximum(gaps, 1)

    def true(values: Floats, variance: Floats, count: Int64 = n) -> Floats:
        """Return the values without their noise; ``variance`` is that of one transaction."""
        several = count > 1
        return _true_values(values, variance / np.maximum(count, 1), several, rng)

    def share(values: Floats, count: Int64 = n) -> Floats:
        # Two transactions added: a share of 0 or 1 of few transactions is not certain.
        middle = (values * count + 1) / (count + 2)
        return np.clip(true(values, middle * (1 - middle), count), 0, 1)

    one = np.ones(accounts)
    # The noise of a count's square root is the same for every rate.
    since = np.maximum(days - start_days, 1.0)
    root_rate = _true_values(np.sqrt(rate), 0.25 / since, n > 0, rng)
    x, y = mean_of(np.cos(angle)), mean_of(np.sin(angle))
    columns = {
        "level": true(np.log(level), np.minimum(spread, 2.0) ** 2),
        "spread": true(np.log(np.maximum(spread, 0.02)), 0.5 * one),
        "rate": 2 * np.log(np.maximum(root_rate, 0.03)),
        "day_x": true(x, mean_of(np.cos(angle) ** 2) - x**2),
        "day_y": true(y, mean_of(np.sin(angle) ** 2) - y**2),
        "weekend": share(mean_of(weekday_of(log.timestamp_ms) >= 5)),
        "reach": np.log(reach),
        "loyalty": np.clip(_true_values(repeats, repeats_noise, n > 2, rng), 0, 1),
        "hubs": share(mean_of(is_hub[log.merchant])),
        "defrauded": frauds > 0,
        "theft": theft,
        "opened": start_days / days,
        "bursts": share(bursts, gaps),
    }
    profiles = np.stack([np.asarray(columns[name], float) for name in PROFILE], 1)
    start_ms = first_ms + np.round(start_days * DAY_MS).astype(np.int64)
    return profiles, np.minimum(start_ms, first - 1)


def _true_values(values: Floats, noise: Floats, known: Bools, rng: np.random.Generator) -> Floats:
    """Draw the true values behind noisy ones [n], from the posterior of a normal population.

    A profile of noisy values would add the noise of a history to that of its profile, and the
    network would learn from the profile what only the history's end can tell.

    Args:
        values: [n] measured.
        noise: [n] variances of their errors.
        known: [n] whether there is enough to measure; the others are drawn from the population.
    """
    if known.sum() < 2:
        return values
    weight = 1 / (noise[known] + values[known].var())
    middle = float(np.average(values[known], weights=weight))
    excess = np.average((values[known] - middle) ** 2 - noise[known], weights=weight)
    between = max(float(excess), 1e-8)
    trust = np.where(known, between / (between + noise), 0.0)
    mean = middle + trust * (values - middle)
    return mean + np.sqrt((1 - trust) * between) * rng.normal(size=len(values))


def _reach(
    log: Dataset, accounts: int, is_hub: Bools, rng: np.random.Generator
) -> tuple[Floats, Floats, Floats]:
    """Estimate the local merchants in reach, and the chance of a repeat with its variance.

    From D different ones in n visits follows a likelihood of each reach; the shares of the
    reaches in the population are its prior (nonparametric empirical Bayes). The reach is drawn
    from the posterior, so the reaches of all accounts have the population's spread.
    """
    local = ~is_hub[log.merchant]
    pair = log.account[local].astype(np.int64) * len(is_hub) + log.merchant[local]
    pairs, visits = np.unique(pair, return_counts=True)
    owner = pairs // len(is_hub)
    distinct = np.bincount(owner, minlength=accounts)
    n = np.bincount(log.account[local], minlength=accounts)
    # Likelihood of a reach, exact but for a factor that is the same for all reaches.
    cases, place, count = np.unique(
        np.stack((distinct, n), 1), axis=0, return_inverse=True, return_counts=True
    )
    seen, visits_of = cases[:, :1], cases[:, 1:]
    factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, REACH_MAX + 1)))))
    log_likelihood = factorial[_REACHES] - factorial[np.maximum(_REACHES - seen, 0)]
    log_likelihood -= visits_of * np.log(_REACHES)
    log_likelihood[_REACHES < seen] = -np.inf
    log_likelihood[seen[:, 0] > REACH_MAX, -1] = 0.0
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    prior = np.full(len(_REACHES), 1 / len(_REACHES))
    for _ in range(30):
        posterior = likelihood * prior
        posterior /= posterior.sum(1, keepdims=True)
        prior = count @ posterior / accounts + 1e-9
        prior /= prior.sum()
    sums = np.cumsum(posterior, 1)
    # One search in all cases' sums: those of a case begin at twice its number.
    share = np.minimum(rng.random(accounts), 1 - 1e-9) * sums[place.ravel(), -1]
    drawn = np.searchsorted(
        (sums + 2 * np.arange(len(cases))[:, None]).ravel(), share + 2 * place.ravel(), side="right"
    )
    drawn = np.minimum(drawn - place.ravel() * len(_REACHES), len(_REACHES) - 1)
    width = np.diff(np.log(_REACHES), append=np.log(REACH_MAX)) * (_REACHES > REACHES_WHOLE)
    reach = _REACHES[drawn] * np.exp(rng.uniform(-0.5, 0.5, accounts) * width[drawn])
    # Chance that two transactions are at one merchant, and the variance of its estimate.
    pairs_of = np.maximum(n * (n - 1.0), 1)
    repeats = np.bincount(owner, visits * (visits - 1.0), accounts) / pairs_of
    chance = np.maximum(repeats, 1 / reach)
    noise = 2 * chance * (1 - chance) / pairs_of + 4 * chance**2 / np.maximum(n, 1)
    return np.maximum(np.round(reach), np.maximum(distinct, 1)), repeats, np.maximum(noise, 1e-12)
