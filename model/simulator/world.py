"""The worlds that the simulator knows: what accounts, merchants and thieves do, and how often.

:data:`HANDBOOK` has the published rules of the Fraud Detection Handbook and nothing else.
:data:`WIDE` keeps them for half of the accounts, and adds what they lack: other amounts and
rates, accounts that begin and fall silent, card checks, and further kinds of fraud.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

WorldName = Literal["handbook", "wide"]

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
"""What the numbers of scenarios mean: 0 is legitimate, 1 to 3 are the Handbook's kinds of fraud."""

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
    """For people: what a scenario is, or its number where the data are a person's own.

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
"""From, to."""


@dataclass(frozen=True)
class AccountKind:
    """A kind of account. Ranges are those that each account draws its own value from.

    Attributes:
        name: for documents and tests.
        share: of the accounts that do not follow the Handbook.
        median: EUR, of the account's payments; evenly on the logarithmic scale.
        spread: deviation of an amount's natural logarithm.
        rate: payments a day; evenly on the logarithmic scale.
        bounds: EUR; an amount outside is drawn again, evenly between them. None: no bounds, and
            the account's level changes.
        fixed_price: share of such accounts whose payments are all of the same amount.
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
    """What a simulated world has. A rate of 0 leaves a behaviour out.

    Attributes:
        name: as on the command line.
        handbook_accounts: share of accounts that pay as the Handbook's customers do.
        map_terminals: share of merchants that are the Handbook's terminals: on the map, each as
            likely as the other. The others are shops that every account reaches.
        kinds: of the other accounts; their shares add up to 1.
        shop_payments: share of the other accounts' payments that go to shops.
        handbook_shop_payments: the same of the Handbook's customers.
        shop_exponent: the shop of rank r is visited in proportion to r to the minus this.
        late_shops: share of the shops that open during the log.
        late_accounts: share of the accounts that begin during the log.
        late_days: mean days from the log's begin to such a begin, of shops and accounts.
        first_checks: share of accounts whose first payment is a shop's card check.
        checks: honest card checks (0.00, 0.01 or 1.00) of an account a day; some come twice.
        silences: honest silences that an account begins a day.
        silence_days: how long they are.
        level_changes: changes of an account's level (its usual amount) a day.
        level_factor: what a change multiplies it with.
        large_purchases: honest purchases far over the usual, of an account a day; fewer of those
            that pay less than once a day, as of sprees.
        large_factor: how many times the usual they are.
        journeys: journeys that an account begins a day: merchants anywhere, other hours.
        journey_days: how long they are.
        sprees: honest series of payments within two hours, of an account a day.
        spree_payments: how many.
        skimmed_terminals: share of the map's terminals that begin a day to be compromised. (In
            the Handbook's own world it is a number, whatever the terminals are.)
        stolen_cards: share of the accounts whose card is stolen a day; the same holds.
        card_tests: thefts that test the card first, per account a day, as are the next four.
        takeovers: thefts from accounts that were silent for three weeks or more.
        bursts: of many payments of about the usual amount within an hour.
        small_frauds: thefts of some payments under the usual amount.
        huge_payments: single payments of 5 to 3,000 times the usual, to 100,000 EUR.
        huge_after_check: the same as a share of the accounts whose only payment is a check, a day.
        fraud_accounts: share of the accounts beginning during the log that a thief opened.
        patient_thieves: thefts over one to seven days, of many payments not far over the usual.
        shops_in_part: share of shops that begin a day to be compromised in part.
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

    @property
    def is_wide(self) -> bool:
        """Whether there is more than the Handbook's rules."""
        return self.name != "handbook"


HOUSEHOLD, FLEET = "household", "fleet"
"""Kinds with rules of their own: payments of several sorts; and one every few seconds, at times."""

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

WORLDS: Mapping[str, World] = {world.name: world for world in (HANDBOOK, WIDE)}
