"""The simulated worlds: behaviour of accounts, merchants and thieves, with its rates.

:data:`HANDBOOK` has exactly the published rules of the Fraud Detection Handbook. :data:`WIDE` uses
them for half of the accounts. It adds other amounts and rates, accounts that open and fall silent,
card checks, and more kinds of fraud. :data:`CHANGING` is the wide world with accounts whose rate or
level changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

WorldName = Literal["handbook", "wide", "changing"]

SCENARIOS = (
    "legitimate",
    "amount over 220",
    "skimmed terminal",
    "stolen card",
    "card test, then drain",
    "takeover after silence",
    "burst of payments",
    "small amounts",
    "one huge payment",
    "new account",
    "merchant in part",
    "patient thief",
)
"""Names of the scenarios by number: 0 is legitimate, 1 to 3 are the Handbook's frauds."""

(
    LEGITIMATE,
    OVER_220,
    SKIMMED_TERMINAL,
    STOLEN_CARD,
    CARD_TEST,
    TAKEOVER,
    BURST,
    SMALL_AMOUNTS,
    HUGE_PAYMENT,
    NEW_ACCOUNT,
    MERCHANT_IN_PART,
    PATIENT,
) = range(len(SCENARIOS))


def scenario_name(number: int) -> str:
    """Return the name of a scenario, or its number if it is not one of the simulator's.

    >>> scenario_name(3), scenario_name(77)
    ('stolen card', 'scenario 77')
    """
    return SCENARIOS[number] if 0 <= number < len(SCENARIOS) else f"scenario {number}"


HIGH_AMOUNT = 220.0
TERMINALS_COMPROMISED_PER_DAY = 2
TERMINAL_COMPROMISED_DAYS = 28
CUSTOMERS_COMPROMISED_PER_DAY = 3
CUSTOMER_COMPROMISED_DAYS = 14
CUSTOMER_FRAUD_PROBABILITY = 1 / 3
CUSTOMER_FRAUD_FACTOR = 5.0
"""The Handbook's rules of fraud; see :mod:`model.simulator.handbook`."""

Range = tuple[float, float]
"""Lower and upper end."""


@dataclass(frozen=True)
class AccountKind:
    """A kind of account. Each account draws its values from the ranges.

    Attributes:
        name: name in documents and tests.
        share: share of the accounts that do not follow the Handbook.
        median: median payment, EUR; drawn evenly on a logarithmic scale.
        spread: deviation of the natural logarithm of an amount.
        rate: payments a day; drawn evenly on a logarithmic scale.
        bounds: bounds of an amount, EUR; an amount outside is redrawn evenly between them.
            None: no bounds, and the level of the account changes.
        fixed_price: share of these accounts whose payments all have the same amount.
    """

    name: str
    share: float
    median: Range
    spread: Range
    rate: Range
    bounds: Range | None = None
    fixed_price: float = 0.0


@dataclass(frozen=True)
class World:
    """Options of a simulated world. Rates are for an account and day; 0 omits a behaviour.

    Attributes:
        name: name on the command line.
        handbook_accounts: share of accounts that pay as the Handbook's customers do.
        map_terminals: share of merchants that are terminals of the Handbook's map, all equally
            likely. The others are shops in reach of every account.
        kinds: kinds of the other accounts; their shares add up to 1.
        shop_payments: share of payments at shops, for the other accounts.
        handbook_shop_payments: share of payments at shops, for the Handbook's customers.
        shop_exponent: exponent e; the shop of rank r has visits in proportion to r ** -e.
        late_shops: share of the shops that open during the log.
        late_accounts: share of the accounts that open during the log.
        late_days: mean days until such a shop or account opens.
        first_checks: share of accounts whose first payment is a card check by a shop.
        checks: rate of honest card checks (0.00, 0.01 or 1.00); some are repeated.
        silences: rate of honest silences.
        silence_days: length of a silence.
        level_changes: rate of changes of an account's level, its usual amount.
        level_factor: factor of a change of level.
        large_purchases: rate of honest purchases far above usual; lower for accounts that pay
            less than once a day, as for sprees.
        large_factor: multiple of the usual amount of a large purchase.
        journeys: rate of journeys, with merchants anywhere and other hours.
        journey_days: length of a journey.
        sprees: rate of honest series of payments within two hours.
        spree_payments: number of payments in a spree.
        skimmed_terminals: share of the map's terminals that become compromised a day. The
            Handbook's own world has a fixed number instead.
        stolen_cards: share of the accounts whose card is stolen a day; fixed there, too.
        card_tests: rate of thefts that test the card first.
        takeovers: rate of thefts from accounts that were silent for three weeks or more.
        bursts: rate of thefts of many usual payments within an hour.
        small_frauds: rate of thefts of some payments below the usual amount.
        huge_payments: rate of single payments of 5 to 3,000 times the usual amount, up to
            100,000 EUR.
        huge_after_check: daily share of huge payments among accounts with only card checks.
        fraud_accounts: share of thieves among the accounts that open during the log.
        patient_thieves: rate of thefts over one to seven days, of many payments near the usual.
        shops_in_part: share of shops that become partly compromised a day.
        moves: rate of moves, which change the payments a day and the level for good. Changes of
            rate and level pass over the Handbook's customers.
        move_rate, move_level: factors of a move.
        salary_changes: rate of lasting changes of the level.
        salary_level: factor of such a change.
        holidays: rate of holidays, with more payments or fewer.
        holiday_days: length of a holiday.
        holiday_rate: factor of the payments a day.
        closures: rate of accounts that close and pay nothing any more.
    """

    name: WorldName
    handbook_accounts: float = 1.0
    map_terminals: float = 1.0
    kinds: tuple[AccountKind, ...] = ()
    shop_payments: float = 0.0
    handbook_shop_payments: float = 0.0
    shop_exponent: float = 1.3
    late_shops: float = 0.0
    late_accounts: float = 0.0
    late_days: float = 150.0
    first_checks: float = 0.0
    checks: float = 0.0
    silences: float = 0.0
    silence_days: Range = (14.0, 90.0)
    level_changes: float = 0.0
    level_factor: Range = (0.5, 2.0)
    large_purchases: float = 0.0
    large_factor: Range = (4.0, 20.0)
    journeys: float = 0.0
    journey_days: Range = (2.0, 21.0)
    sprees: float = 0.0
    spree_payments: Range = (4.0, 12.0)
    skimmed_terminals: float = 0.0
    stolen_cards: float = 0.0
    card_tests: float = 0.0
    takeovers: float = 0.0
    bursts: float = 0.0
    small_frauds: float = 0.0
    huge_payments: float = 0.0
    huge_after_check: float = 0.0
    fraud_accounts: float = 0.0
    patient_thieves: float = 0.0
    shops_in_part: float = 0.0
    moves: float = 0.0
    move_rate: Range = (0.3, 3.0)
    move_level: Range = (0.5, 2.0)
    salary_changes: float = 0.0
    salary_level: Range = (0.4, 2.5)
    holidays: float = 0.0
    holiday_days: Range = (5.0, 21.0)
    holiday_rate: Range = (0.2, 4.0)
    closures: float = 0.0

    @property
    def has_life_changes(self) -> bool:
        """Whether rates and levels of accounts change as in :data:`CHANGING`."""
        return self.moves + self.salary_changes + self.holidays + self.closures > 0

    @property
    def is_wide(self) -> bool:
        """Whether the world has more than the Handbook's rules."""
        return self.name != "handbook"


HOUSEHOLD, FLEET = "household", "fleet"
"""Kinds with special rules: a household has several sorts of payments, a fleet has bursts."""

KINDS = (
    AccountKind("transit", 0.14, (0.8, 4.0), (0.1, 0.4), (1.5, 8.0), (0.5, 6.0), 0.3),
    AccountKind("coffee", 0.12, (3.0, 6.0), (0.1, 0.35), (0.5, 4.0), (2.0, 8.0), 0.1),
    AccountKind("groceries", 0.16, (18.0, 80.0), (0.3, 0.7), (0.3, 3.0), (10.0, 150.0)),
    AccountKind(HOUSEHOLD, 0.2, (20.0, 80.0), (0.5, 1.0), (1.0, 8.0)),
    AccountKind("business", 0.09, (100.0, 10_000.0), (0.6, 1.3), (0.3, 8.0)),
    AccountKind("any", 0.1492, (1.0, 10_000.0), (0.2, 1.0), (0.1, 8.0), fixed_price=0.1),
    AccountKind("rare", 0.14, (5.0, 2_000.0), (0.2, 0.9), (1 / 45, 1 / 8), fixed_price=0.2),
    AccountKind(FLEET, 0.0008, (0.5, 3.0), (0.0, 0.4), (0.3, 2.0), (0.3, 6.0)),
)

HANDBOOK = World("handbook")

WIDE = World(
    "wide",
    handbook_accounts=0.5,
    map_terminals=0.8,
    kinds=KINDS,
    shop_payments=0.7,
    handbook_shop_payments=0.1,
    late_shops=0.3,
    late_accounts=0.3,
    first_checks=0.25,
    checks=1 / 180,
    silences=1 / 600,
    level_changes=1 / 250,
    large_purchases=1 / 1000,
    journeys=1 / 200,
    sprees=1 / 150,
    skimmed_terminals=TERMINALS_COMPROMISED_PER_DAY / 10_000,
    stolen_cards=CUSTOMERS_COMPROMISED_PER_DAY / 6_000,
    card_tests=4e-4,
    takeovers=1.3e-4,
    bursts=8e-5,
    small_frauds=2.0e-4,
    huge_payments=1.2e-3,
    huge_after_check=0.06,
    fraud_accounts=0.05,
    patient_thieves=8e-5,
    shops_in_part=1.4e-4,
)

CHANGING = replace(
    WIDE,
    name="changing",
    handbook_accounts=0.2,
    moves=1 / 150,
    salary_changes=1 / 150,
    holidays=1 / 120,
    closures=1 / 600,
)

WORLDS: Mapping[str, World] = {world.name: world for world in (HANDBOOK, WIDE, CHANGING)}
