"""Text tables: names with values beneath one another, and columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table


def pair_lines(rows: Sequence[tuple[str, str]], *, align_right: bool = False) -> Iterator[str]:
    """Yield indented lines of names and values, with the values beneath one another.

    Args:
        rows: names and values; an empty name continues the row before it.
        align_right: whether names end, and not begin, in one column.

    >>> list(pair_lines([("state", "400 bytes"), ("age", "2 days")]))
    ['  state  400 bytes', '  age    2 days']
    """
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        padded = name.rjust(width) if align_right else name.ljust(width)
        yield f"  {padded}  {value}"


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    wraps_first: bool = False,
) -> None:
    """Print a table without borders: the first column is aligned left, the others right.

    Args:
        wraps_first: whether texts of the first column may take several lines.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(
            heading,
            justify="right" if number else "left",
            no_wrap=number > 0 or not wraps_first,
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def widen(console: Console, columns: int) -> None:
    """Give a console at least this width: a narrow terminal wraps lines, where rich would cut."""
    console.width = max(console.width, columns)
