"""Numbers for the kinds of fraud that a file's scenario column names."""

from __future__ import annotations

from pipeline.errors import RecurError

SCENARIOS_MAX = 100
"""Limit of different kinds of fraud."""


class ScenarioNumbers:
    """Numbers of scenarios: 0 for none, a whole number for itself, else the next free number.

    >>> numbers = ScenarioNumbers()
    >>> [numbers.number_of(name) for name in ("", "2", "stolen card", "2", "takeover")]
    [0, 2, 1, 2, 3]
    """

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    @property
    def names(self) -> dict[int, str]:
        """Names of the scenarios by number."""
        return {number: name for name, number in self._number.items()}

    def number_of(self, name: str | None) -> int:
        """Find a scenario's number, or assign the next one.

        Raises:
            RecurError: there are more than :data:`SCENARIOS_MAX` scenarios.
        """
        if name is None or name in ("", "0", "0.0"):
            return 0
        if name not in self._number:
            if len(self._number) >= SCENARIOS_MAX:
                raise RecurError(
                    f"the scenario column has more than {SCENARIOS_MAX} values, but it must name"
                    " the kind of fraud: map another column, or none"
                )
            self._number[name] = self._free_number(name)
        return self._number[name]

    def _free_number(self, name: str) -> int:
        used = set(self._number.values())
        if name.isdecimal() and int(name) <= SCENARIOS_MAX and int(name) not in used:
            return int(name)
        return min(set(range(1, SCENARIOS_MAX + 1)) - used)
