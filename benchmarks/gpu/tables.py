"""Results as tables: a row's fields are the columns."""

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.few_tokens import Row

_HIDDEN = ("samples", "us_min", "us_max", "times_the_cache")  # in the file, not on the screen


def show(console: Console, title: str, rows: list[Row]) -> None:
    """One table; nothing for no rows."""
    if not rows:
        return
    names = [name for name in rows[0] if name not in _HIDDEN]
    table = Table(title=title)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(_spoken(row.get(name, "")) for name in names))
    console.print(table)


def _spoken(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
