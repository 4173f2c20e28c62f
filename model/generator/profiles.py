"""Profiles of accounts: how they are measured, and a smooth density to draw new ones from.

The density is a mixture of normal distributions over ranks (a Gaussian copula with several
centres), with the marginals as smoothed quantiles. It holds no account's own vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.generator.draws import keys_of, normal, uniform
from model.generator.settings import GeneratorError

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]

PROFILE = (
    "level",  # log of the mean amount
    "spread",  # log of the relative deviation of amounts
    "rate",  # log of transactions a day
    "day_x",  # mean cosine of the time of day
    "day_y",  # mean sine of the time of day
    "weekend",  # share of transactions on Saturday and Sunday
    "reach",  # log of the local merchants in reach
    "loyalty",  # chance that two transactions are at the same local merchant
    "hubs",  # share of transactions at hubs
    "defrauded",  # 1 if there is fraud on the account itself, else 0
    "theft",  # log of a fraud's mean amount, relative to the level; drawn if there is none
    "opened",  # share of the period that passes before the account opens
    "bursts",  # share of gaps under an hour
)
"""Numbers of a profile, in order."""

AT = {name: place for place, name in enumerate(PROFILE)}

CENTRES = 6
QUANTILES = 65
SHRINKAGE = 0.1
"""Part of a centre's covariance that is replaced by that of all accounts."""

_ACCOUNTS_PER_CENTRE = 60
_ROUNDS = 15
_PROFILE_STREAM = 11


@dataclass(frozen=True)
class ProfileDensity:
    """Density of profiles.

    Attributes:
        weight: [C] shares of the centres.
        mean: [C, P] centres of the normal scores.
        factor: [C, P, P] Cholesky factors of their covariances.
        quantiles: [P, Q] of the numbers, from the score's share 0 to 1.
    """

    weight: Floats
    mean: Floats
    factor: Floats
    quantiles: Floats

    def draw(self, seed: int, accounts: NDArray[Any]) -> Floats:
        """Draw the profiles [n, P] of numbered accounts; seed and number decide each."""
        keys = keys_of(seed, _PROFILE_STREAM, accounts)
        centre = np.searchsorted(np.cumsum(self.weight)[:-1], uniform(keys, 0, 0), side="right")
        places = len(PROFILE)
        noise = np.stack([normal(keys, 1 + place, 1) for place in range(places)], 1)
        score = self.mean[centre] + np.einsum("nij,nj->ni", self.factor[centre], noise)
        share = _share_of(score)
        grid = np.linspace(0, 1, self.quantiles.shape[1])
        drawn = [np.interp(share[:, p], grid, self.quantiles[p]) for p in range(places)]
        profile = np.stack(drawn, 1)
        profile[:, AT["defrauded"]] = profile[:, AT["defrauded"]] > 0.5
        return profile

    def share_of(self, name: str, profiles: Floats) -> Floats:
        """Return the share [n] of accounts whose number of that name is smaller."""
        quantiles = self.quantiles[AT[name]]
        rising = quantiles + 1e-9 * np.arange(len(quantiles))
        grid = np.linspace(0, 1, len(quantiles))
        return np.asarray(np.interp(profiles[:, AT[name]], rising, grid))

    def tables(self) -> dict[str, Floats]:
        """Return the arrays by name."""
        return {
            "weight": self.weight,
            "mean": self.mean,
            "factor": self.factor,
            "quantiles": self.quantiles,
        }


def fit_density(profiles: Floats, seed: int) -> ProfileDensity:
    """Fit the density to profiles [n, P].

    Raises:
        GeneratorError: there are too few profiles.
    """
    n, places = profiles.shape
    if n < 2:
        raise GeneratorError(f"{n} accounts have a profile; at least 2 are needed")
    rng = np.random.default_rng(seed)
    score = np.stack([_scores(profiles[:, p], rng) for p in range(places)], 1)
    grid = np.linspace(0, 1, QUANTILES)
    quantiles = np.stack([_smooth_quantiles(profiles[:, p], grid) for p in range(places)])
    centres = max(1, min(CENTRES, n // _ACCOUNTS_PER_CENTRE))
    weight, mean, covariance = _mixture(score, centres, rng)
    factor = np.linalg.cholesky(covariance).astype(np.float64)
    return ProfileDensity(weight, mean, factor, quantiles)


def _scores(values: Floats, rng: np.random.Generator) -> Floats:
    """Return normal scores [n] of the ranks; equal values get ranks in random order."""
    order = np.lexsort((rng.random(len(values)), values))
    rank = np.empty(len(values))
    rank[order] = (np.arange(len(values)) + 0.5) / len(values)
    return _normal_quantile(rank)


def _smooth_quantiles(values: Floats, grid: Floats) -> Floats:
    """Return quantiles whose ends are means of the extreme values, so nobody's own."""
    quantiles = np.quantile(values, grid)
    few = max(2, min(len(values) // 100, 20))
    ordered = np.sort(values)
    quantiles[0], quantiles[-1] = ordered[:few].mean(), ordered[-few:].mean()
    return np.maximum.accumulate(quantiles)


def _mixture(score: Floats, centres: int, rng: np.random.Generator) -> tuple[Floats, ...]:
    """Fit a mixture of normal distributions by expectation maximization."""
    n, places = score.shape
    whole = np.cov(score.T) + 1e-3 * np.eye(places)
    if centres == 1:
        return np.ones(1), score.mean(0)[None], whole[None]
    mean = score[rng.choice(n, centres, replace=False)]
    covariance = np.repeat(whole[None], centres, 0)
    weight = np.full(centres, 1 / centres)
    for _ in range(_ROUNDS):
        log = np.stack(
            [_log_normal(score, mean[c], covariance[c]) for c in range(centres)], 1
        ) + np.log(weight)
        log -= log.max(1, keepdims=True)
        part = np.exp(log)
        part /= part.sum(1, keepdims=True)
        total = part.sum(0) + 1.0
        weight = total / total.sum()
        mean = part.T @ score / total[:, None]
        for c in range(centres):
            off = score - mean[c]
            own = (part[:, c, None] * off).T @ off / total[c]
            covariance[c] = (1 - SHRINKAGE) * own + SHRINKAGE * whole
    return weight, mean, covariance


def _log_normal(score: Floats, mean: Floats, covariance: Floats) -> Floats:
    factor = np.linalg.cholesky(covariance)
    off = np.linalg.solve(factor, (score - mean).T)
    return np.asarray(-0.5 * (off**2).sum(0) - np.log(np.diag(factor)).sum())


def _share_of(score: Floats) -> Floats:
    """Return the normal distribution function, to 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    x = np.abs(score) / np.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    series = t * (
        0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    )
    error = 1 - series * np.exp(-(x**2))
    return np.asarray(0.5 * (1 + np.sign(score) * error))


def _normal_quantile(share: Floats) -> Floats:
    """Return normal quantiles, by interpolation of the distribution function."""
    grid = np.linspace(-6, 6, 6001)
    return np.asarray(np.interp(share, _share_of(grid), grid))


GIVEN = {
    "mean_amount": ("level", 1e-2, 1e7),
    "deviation": ("spread", 1e-3, 100.0),
    "payments_per_day": ("rate", 1e-3, 500.0),
    "weekend_share": ("weekend", 0.0, 1.0),
    "merchants": ("reach", 1.0, 2000.0),
    "loyalty": ("loyalty", 0.0, 1.0),
    "hub_share": ("hubs", 0.0, 1.0),
    "defrauded": ("defrauded", 0.0, 1.0),
    "fraud_factor": ("theft", 1e-3, 1e4),
    "bursts": ("bursts", 0.0, 1.0),
}
"""Keys of a profile file: the number of the profile, and its bounds."""

_LOGARITHMS = ("level", "spread", "rate", "reach", "theft")


def with_given(profiles: Floats, given: Mapping[str, float], keys: NDArray[np.uint64]) -> Floats:
    """Replace numbers of profiles [n, P] by given ones, in the units of :data:`GIVEN`.

    ``defrauded`` is a probability, and ``keys`` [n] decide which accounts it hits.

    Raises:
        GeneratorError: an unknown key, or a value out of bounds.
    """
    profiles = profiles.copy()
    for name, value in given.items():
        if name == "hour":
            if not 0 <= value < 24:
                raise GeneratorError(f"hour is {value}; it must be 0 to 24")
            length = np.hypot(profiles[:, AT["day_x"]], profiles[:, AT["day_y"]])
            profiles[:, AT["day_x"]] = length * np.cos(2 * np.pi * value / 24)
            profiles[:, AT["day_y"]] = length * np.sin(2 * np.pi * value / 24)
            continue
        if name not in GIVEN:
            raise GeneratorError(
                f"there is no {name[:40]!r} in a profile; its keys are hour, {', '.join(GIVEN)}"
            )
        place, least, most = GIVEN[name]
        if not least <= value <= most:
            raise GeneratorError(f"{name} is {value}; it must be {least:g} to {most:g}")
        if place == "defrauded":
            profiles[:, AT[place]] = uniform(keys, 0, 0) < value
        else:
            profiles[:, AT[place]] = np.log(value) if place in _LOGARITHMS else value
    return profiles
