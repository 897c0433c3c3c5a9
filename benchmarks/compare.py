"""What got slower, or worse in another way? Two results of one benchmark, figure by figure.

    python -m benchmarks.compare OLD.json NEW.json [--threshold 5] [--all]
    python -m benchmarks.compare --git REV [FILE.json ...]     what is committed at REV against the working copy

A figure is worse when its median is worse by more than the noise. The noise is how far the better half of the samples
reaches from the median, in the noisier of both runs: what disturbs a measurement makes it worse, so the worse half says
more of the machine. It is never taken as less than --threshold, nor as less than twice that for a figure with fewer
than three samples; simulated figures have none, there 1 % counts. Only figures of equal settings are compared, and
those of rivals are never regressions. Ends with 0, with 1 when something is worse, with 2 when there is nothing to
compare: other machines, other benchmarks, other formats.
"""

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import figures
from benchmarks.figures import Contents, Figure, contents
from benchmarks.reporting import FORMAT, RESULTS, wide_console

SIMULATED = 0.01
MACHINE_DRIFT = 0.15  # of the measured read limit: beyond that the runs did not have the same machine
_SAME_MACHINE = ("system", "cpu", "cores", "memory_gb")
Verdict = Literal["worse", "better", "same", "rival", "not judged", "other settings"]
_MOST_ROWS, _MOST_NOTES = 40, 15
_SHOWN: tuple[Verdict, ...] = ("worse", "better")


class NothingToCompareError(Exception):
    """The two results cannot be compared; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of both results. change: how much worse the new one is, negative where it is better; noise: of it."""

    path: figures.Path
    old: float
    new: float
    change: float
    noise: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """rows: figures that both have. warnings: what to know of them. lost, added: figures that only one has."""

    rows: tuple[Compared, ...]
    warnings: tuple[str, ...]
    lost: tuple[figures.Path, ...]
    added: tuple[figures.Path, ...]

    @property
    def worse(self) -> bool:
        return any(row.verdict == "worse" for row in self.rows)


def parse(text: str, name: str) -> dict[str, Any]:
    """A result. Raises NothingToCompareError for what is none, or is of another format."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NothingToCompareError(f"{name} is not JSON ({error}): give a file of benchmarks/results") from error
    if not isinstance(found, dict) or not isinstance(found.get("machine"), dict):
        raise NothingToCompareError(f"{name} does not say of which machine it is: it is no benchmark's result")
    version = found.get("format", FORMAT)  # files from before formats were counted are of the first
    if version != FORMAT:
        raise NothingToCompareError(
            f"{name} has format {version}, this version of the program reads {FORMAT}: run the benchmark again"
        )
    return found


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float, *, anyway: bool = False) -> Comparison:
    """Judge every figure. threshold: least relative change that counts. anyway: also of different machines."""
    warnings = _warnings(old, new, anyway)
    before, after = contents(old), contents(new)
    others = _other_settings(before, after)
    for place, text in others.items():
        warnings.append(f"other settings{f' in {_name(place)}' if place else ''}: {text}")
    rows = []
    for path, one in before.figures.items():
        other = after.figures.get(path)
        if other is None:
            continue
        row = judge(path, one, other, threshold)
        if any(path[: len(place)] == place for place in others):
            row = Compared(path, row.old, row.new, row.change, row.noise, "other settings")
        elif one.of_machine and one.value > 0 and abs(other.value / one.value - 1) > MACHINE_DRIFT:
            warnings.append(f"the machine differed: {_name(path)} was {one.value:.4g}, is {other.value:.4g}")
        rows.append(row)
    lost = tuple(path for path in before.figures if path not in after.figures)
    added = tuple(path for path in after.figures if path not in before.figures)
    if not rows:
        raise NothingToCompareError("the two results have no figure in common: they are of different benchmarks")
    return Comparison(tuple(rows), tuple(warnings), lost, added)


def judge(path: figures.Path, old: Figure, new: Figure, threshold: float) -> Compared:
    """One figure, as the module says."""
    better = old.better
    noise = max(_noise(each, threshold) for each in (old, new))
    change = _change(old.value, new.value) * (-1 if better == "more" else 1)
    verdict: Verdict = "worse" if change > noise else "better" if -change > noise else "same"
    if better is None:
        verdict = "not judged"
    elif old.rival:
        verdict = "rival"
    return Compared(path, old.value, new.value, change, noise, verdict)


def _change(old: float, new: float) -> float:
    """(new - old) over the smaller of both: twice as much and half as much are equally far."""
    least = min(abs(old), abs(new))
    if abs(new - old) < 1e-12:
        return 0.0
    return (new - old) / least if least > 0 else float("inf") if new > old else float("-inf")


def _noise(figure: Figure, threshold: float) -> float:
    if figure.simulated:
        return SIMULATED
    reach = figure.high - figure.value if figure.better == "more" else figure.value - figure.low
    own = reach / abs(figure.value) if figure.value else 0.0
    return max(own, threshold if figure.n >= 3 else 2 * threshold)


def _warnings(old: dict[str, Any], new: dict[str, Any], anyway: bool) -> list[str]:
    """Of runs that differ. Raises NothingToCompareError where they differ too much."""
    for key in ("benchmark", "question"):
        if key in old and old.get(key) == new.get(key):
            break
    else:
        names = [each.get("benchmark") or each.get("question") for each in (old, new)]
        if all(names) and names[0] != names[1]:
            raise NothingToCompareError(f"these are results of two benchmarks: {names[0]!r} and {names[1]!r}")
    found = []
    machines = old["machine"], new["machine"]
    for key in dict.fromkeys((*machines[0], *machines[1])):
        was, is_now = (each.get(key) for each in machines)
        if was == is_now:
            continue
        if key in _SAME_MACHINE and not anyway:
            raise NothingToCompareError(
                f"the machines differ, {key} was {was!r} and is {is_now!r}: measure both on one, or give --anyway"
            )
        found.append(f"{key} was {was}, is {is_now}")
    if any(str(each.get("commit", "")).endswith("-dirty") for each in (old, new)):
        found.append("a run was of a tree with changes that are in no commit")
    return found


def _other_settings(before: Contents, after: Contents) -> dict[figures.Path, str]:
    """The places whose settings differ, and how."""
    found: dict[figures.Path, list[str]] = {}
    for path, value in before.settings.items():
        if path in after.settings and after.settings[path] != value:
            found.setdefault(path[:-1], []).append(f"{path[-1]} was {value}, is {after.settings[path]}")
    return {place: ", ".join(texts) for place, texts in found.items()}


def show(console: Console, comparison: Comparison, *, every: bool = False) -> None:
    """A table of what is worse or better, the worst first, or of all; then what was not compared."""
    rows = sorted((row for row in comparison.rows if every or row.verdict in _SHOWN), key=lambda row: -row.change)
    shown = rows if every else _most_changed(rows)
    if shown:
        table = Table("figure", "old", "new", "ratio", "noise", "verdict")
        for column in table.columns[1:5]:
            column.justify = "right"
        for row in shown:
            ratio = f"{row.new / row.old:.3f}" if row.old else ""
            table.add_row(
                escape(_name(row.path)), f"{row.old:.5g}", f"{row.new:.5g}", ratio, f"{row.noise:.1%}", row.verdict
            )
        console.print(table)
    if len(shown) < len(rows):
        console.print(f"{len(rows) - len(shown)} more changed by less; --all shows them")
    for text in comparison.warnings if every else comparison.warnings[:_MOST_NOTES]:
        console.print(f"note: {escape(text)}", soft_wrap=True)
    if not every and len(comparison.warnings) > _MOST_NOTES:
        console.print(f"{len(comparison.warnings) - _MOST_NOTES} more notes; --all shows them")
    unknown = Counter(row.path[-1] for row in comparison.rows if row.verdict == "not judged")
    if unknown:
        names = ", ".join(name for name, _ in unknown.most_common(20))
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        console.print(f"not judged, nobody said which way is better: {escape(names)}{more}", soft_wrap=True)
    for paths, where in ((comparison.lost, "old"), (comparison.added, "new")):
        if paths:
            console.print(f"{len(paths)} figures only in the {where} one, such as {escape(_name(paths[0]))}")
    counts = Counter(row.verdict for row in comparison.rows)
    console.print("; ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))


def _most_changed(rows: list[Compared]) -> list[Compared]:
    """Those that changed most, in the order of `rows`."""
    least = sorted((abs(row.change) for row in rows), reverse=True)[:_MOST_ROWS]
    return [row for row in rows if abs(row.change) >= least[-1]][:_MOST_ROWS] if rows else []


def _name(path: figures.Path) -> str:
    return " / ".join(path)


def at_revision(file: Path, revision: str) -> str:
    """The file's text in a commit. Raises NothingToCompareError where there is none."""
    command = ["git", "show", f"{revision}:./{file.name}"]
    try:
        done = subprocess.run(command, cwd=file.parent, capture_output=True, check=False)
    except OSError as error:
        raise NothingToCompareError(f"git cannot be run in {file.parent}: {error}") from error
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines() or ["git failed"]
        raise NothingToCompareError(f"{file.name} at {revision}: {last[0]}")
    return done.stdout.decode("utf-8", errors="replace")


def _pairs(files: list[Path], revision: str | None) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(title, old, new) of what is to be compared."""
    if revision is None:
        if len(files) != 2:
            raise NothingToCompareError(f"two results are compared, got {len(files)}: OLD.json NEW.json, or --git REV")
        old, new = (parse(_read(file), file.name) for file in files)
        return [(f"{files[0].name} and {files[1].name}", old, new)]
    found = []
    for file in files or sorted(RESULTS.glob("*.json")):
        text, before = _read(file), None
        try:
            before = at_revision(file, revision)
        except NothingToCompareError:
            if files:  # what was asked for must be there; of all results, new ones have no past
                raise
        if before is not None and before != text:
            old, new = parse(before, f"{file.name} at {revision}"), parse(text, file.name)
            found.append((f"{file.name} since {revision}", old, new))
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NothingToCompareError(f"{file} cannot be read: {error}") from error


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="OLD.json NEW.json; with --git those to look at.")] = None,
    git: Annotated[str | None, typer.Option(metavar="REV", help="Compare with what this commit has.")] = None,
    threshold: Annotated[float, typer.Option(min=0, max=1000, help="Least change that counts, in percent.")] = 5.0,
    every: Annotated[bool, typer.Option("--all", help="Show all figures, not only those that changed.")] = False,
    anyway: Annotated[bool, typer.Option(help="Compare results of different machines too.")] = False,
) -> None:
    """Say what got slower, or worse, between two results of a benchmark."""
    console, worse = wide_console(), False
    try:
        pairs = _pairs(list(files or ()), git)
        if not pairs:
            console.print(f"no result differs from {git}")
        for title, old, new in pairs:
            commits = " and ".join(str(each.get("commit", "unknown"))[:12] for each in (old, new))
            console.print(f"[bold]{escape(title)}[/bold], commits {escape(commits)}", soft_wrap=True)
            comparison = compare(old, new, threshold / 100, anyway=anyway)
            show(console, comparison, every=every)
            worse = worse or comparison.worse
    except NothingToCompareError as error:
        Console(stderr=True).print(f"nothing to compare: {error}", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(2) from error
    if worse:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
