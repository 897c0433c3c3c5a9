"""The figures of `measure` as tables."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.predictor.measure import LOOK_AHEAD, Measured, distances
from moe_offload.predictor.resampling import Interval, Ratio

PUBLISHED = (
    "gate look-ahead 88.6 % and a trained predictor 94.7 % slot recall on Qwen3-30B-A3B; LayerScope's predictor 94 to "
    "99 % by its own definition (top 4 predicted inside the true top 6)"
)
DIFFERENT = (
    "Published figures are of other models and texts, and by other definitions: beside these they show what is usual, "
    "not who is better."
)


def show(console: Console, measured: Measured, what: str, threshold: float) -> None:
    """Print all tables."""
    for mode in next(iter(measured.evaluations.values())):
        for table in (_recall(measured, mode, what), _rest(measured, mode), _presence(measured, mode, threshold)):
            console.print(table)
    console.print(_caches(measured))
    console.print(f"Published: {PUBLISHED}. {DIFFERENT}")


def _recall(measured: Measured, mode: str, what: str) -> Table:
    table = Table(title=f"{what}, {mode}: slot recall by distance, % (95 % interval over sequences)")
    far = distances(measured.evaluations[LOOK_AHEAD][mode])
    _columns(table, "predictor", *(f"at {each}" for each in far), *(f"closed {each}" for each in far))
    for name, modes in measured.evaluations.items():
        against = {} if name == LOOK_AHEAD else measured.against(name)[mode]
        closed = [against[str(each)]["all"]["gap_closed"] if against else None for each in far]
        table.add_row(name, *(_percent(modes[mode].at(each).recall) for each in far), *map(_listed, closed))
    table.caption = "All layers. Closed: share of what look-ahead lacks to 100 %, paired by sequence."
    return table


def _rest(measured: Measured, mode: str) -> Table:
    table = Table(title=f"{mode}: other measures, %; Brier score and calibration error")
    _columns(
        table, "predictor", "at", "from layers", "k+1", "k+2", "k+4", "exact", "loose", "4 in 6", "Brier", "error"
    )  # fmt: skip
    for name, modes in measured.evaluations.items():
        for distance in distances(modes[mode]):
            figures = modes[mode].at(distance)
            table.add_row(
                name,
                str(distance),
                _percent(modes[mode].at(distance, sources=slice(1, None)).recall),
                *(_short(each) for each in figures.recall_beyond.values()),
                *(_short(each) for each in (figures.exact, figures.loose, figures.four_in_six)),
                f"{figures.brier.value:.4f}",
                f"{figures.curve.error:.4f}",
            )
    table.caption = (
        "From layers: recall without what the embedding predicts. k+m: recall with m more predicted. Loose: top k "
        "predicted inside the true k + 2."
    )
    return table


def _presence(measured: Measured, mode: str, threshold: float) -> Table:
    names = {0: "prompt"}
    unit = "sequences" if mode == "decode" else "tokens"
    sizes = list(next(iter(measured.evaluations.values()))[mode].at(1).presence)
    table = Table(title=f"{mode}: presence at a threshold of {threshold}, precision / recall, %")
    _columns(
        table, "predictor", "at", *(names.get(size, f"{size} {unit}" if size > 1 else "1 sequence") for size in sizes)
    )
    for name, modes in measured.evaluations.items():
        for distance in distances(modes[mode]):
            presence = modes[mode].at(distance).presence
            cells = [f"{_short(each.precision)} / {_short(each.recall)}" for each in presence.values()]
            table.add_row(name, str(distance), *cells)
    return table


def _caches(measured: Measured) -> Table:
    rates = next(iter(measured.caches.values()))
    table = Table(title="Hits of a cache with experts loaded ahead, %; one sequence at a time")
    _columns(table, "predictor", *(f"{each.capacity} experts" for each in rates))
    table.add_row("none (LRU)", *(_percent(each.lru) for each in rates))
    for name, found in measured.caches.items():
        table.add_row(name, *(_percent(each.predicted) for each in found))
    table.add_row("Belady, on demand", *(_percent(each.belady) for each in rates))
    return table


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right")


def _percent(ratio: Ratio) -> str:
    return _interval(ratio.interval())


def _interval(found: Interval) -> str:
    if found.value != found.value:
        return "-"
    span = "" if found.low != found.low else f" ({100 * found.low:.1f}-{100 * found.high:.1f})"
    return f"{100 * found.value:.1f}{span}"


def _listed(values: list[Any] | None) -> str:
    return "" if values is None else _interval(Interval(*(float("nan") if each is None else each for each in values)))


def _short(ratio: Ratio) -> str:
    return "-" if ratio.value != ratio.value else f"{100 * ratio.value:.1f}"
