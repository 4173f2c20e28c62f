"""The rows of the benchmark's table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


@dataclass
class Results:
    """Rows of the table: measurement, value, target, and whether it is met."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, what: str, measured: str, target: str = "-", met: bool = True) -> None:
        """Add a row and print it."""
        self.rows.append((what, measured, target, met))
        console.print(f"  {what}: [bold]{measured}[/] (target {target})")

    def table(self) -> Table:
        """Make the table of all rows."""
        table = Table(title="Recur on this machine")
        for heading in ("measurement", "measured", "target", ""):
            table.add_column(heading)
        for what, measured, target, met in self.rows:
            mark = "" if target == "-" else "[green]met[/]" if met else "[red]missed[/]"
            table.add_row(what, measured, target, mark)
        return table


class Rounds:
    """Values of the same measurements in several rounds, by name."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """Add the value of a round and print it."""
        self._values[name].append(value)
        console.print(f"    {name}: {value:,.1f}", style="dim")

    def median(self, name: str) -> float:
        """Return the median of a measurement's rounds; not a number if it has none."""
        return median(self._values[name]) if self._values[name] else float("nan")

    def ratio(self, name: str, other: str) -> float:
        """Return the median of the ratios within a round."""
        return median(a / b for a, b in zip(self._values[name], self._values[other], strict=True))

    def spread(self, name: str) -> str:
        """Print the median and in ( ) the least and the greatest value."""
        values: Sequence[float] = self._values[name]
        return f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"
