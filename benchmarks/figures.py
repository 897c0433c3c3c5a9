"""A result's figures with their paths, and which of them are better when larger: what `benchmarks.compare` compares.

Results are nested dicts and lists. A figure is a spread {median, min, max, n} or a plain number; the innermost name on
its path that a table here knows says which way is better. What no table knows is not judged. Rows of a list are told
apart by their settings (context, batch, policy, ...), so that rows may be added or change their order.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Better = Literal["more", "less"]
Path = tuple[str, ...]

MORE = frozenset(
    """
    tokens_per_s tokens_per_s_with_prefill gop_per_s recall recall_f32 recall_int8 precision gain
    settled_gain lead least_lead ratio_to ratios share_of_limit percent_of_limit percent_of_read_limit shares saved
    overlap guarded alone top1 equal_tokens greedy_equal least_times_ours_many_experts mean_times_ours_many_experts
    """.split()
)
LESS = frozenset(
    """
    seconds first_token load load_time_ratio seconds_per_token us ms us_spread ms_per_step planning_us
    learn_us_per_layer kernels anon file peak_bytes memory_per_source scheduler_bytes loss perplexity percent
    error_of_activations brier calibration_error mean_difference mean_gap worst_gap mean_gap_with_prefetch
    worst_gap_with_prefetch share_of_experts divergence max_divergence mean_error max_error
    """.split()
)
MORE_ENDINGS = ("_per_s", "_per_second")
LESS_ENDINGS = ("_s", "_ms", "_us", "_ns", "_seconds")
# Of the machine, or of the choice of work: they explain figures and are none.
MACHINE = frozenset({"read_limit_gb_per_s", "link_gb_per_s", "at_read_limit_us", "bf16_noise"})
# Dicts of numbers that explain figures: how busy each part was.
_EXPLAINING = frozenset({"busy"})
# Other values of these make other work: what lies below the dict that has them is not compared.
SETTINGS = frozenset(
    """
    shape model_type layers experts top_k batch context prompt_tokens new_tokens tokens threads torch_threads group
    gguf weights dense activations kind device server gib gib_per_format budget_bytes weight_bytes expert_bytes
    other_bytes enforced most_experts_on_device workspace_bytes oracle_foresees_steps seen warm counted simulated unit
    """.split()
)
# Beside the settings, what tells the rows of a list apart.
LABELS = SETTINGS | frozenset(
    "name policy predictor kernel routing cache capacity share distance layer sequences prompt grows value".split()
)
# Rivals' figures drift with the machine and their versions: they are shown, and are no regressions of ours.
RIVALS = ("transformers", "llama.cpp", "accelerate", "torch", "eager", "grouped_mm", "batched_mm")
_TIMES = frozenset({"s", "ms", "us", "ns"})
_SPREAD = ("median", "min", "max")


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured number. low, high, n: of its samples; n is 0 for a plain number. better: None where it is not known.

    rival: another program's. simulated: of a model's clock, without noise.
    """

    value: float
    low: float
    high: float
    n: int
    better: Better | None
    rival: bool = False
    simulated: bool = False
    of_machine: bool = False


@dataclass(slots=True)
class Contents:
    """figures and settings of a result, by their paths."""

    figures: dict[Path, Figure] = field(default_factory=dict)
    settings: dict[Path, Any] = field(default_factory=dict)


def contents(result: Mapping[str, Any]) -> Contents:
    """All figures and settings of a result, but for what tells of the run as a whole."""
    found = Contents()
    about = ("format", "benchmark", "commit", "machine", "question")
    _walk({key: value for key, value in result.items() if key not in about}, (), False, None, found)
    return found


def direction(path: Path) -> Better | None:
    """Which way is better, by the innermost name that is known; None for settings and for what nobody knows."""
    for name in reversed(path):
        if name in MORE:
            return "more"
        if name in LESS:
            return "less"
        if name in SETTINGS or name in MACHINE:
            return None
        if name.endswith(MORE_ENDINGS) or name.startswith(("times torch", "times_torch")):
            return "more"
        if name.endswith(LESS_ENDINGS):
            return "less"
    return None


def number(value: object) -> float | None:
    """A finite float of a JSON number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _walk(value: Any, path: Path, simulated: bool, unit: str | None, found: Contents) -> None:
    if isinstance(value, dict):
        said = value.get("simulated")  # true, or in words; a dict of that name is only itself simulated
        simulated = simulated or said is True or isinstance(said, str) or path[-1:] == ("simulated",)
        given = value.get("unit")
        unit = given if isinstance(given, str) else unit
        spread = _spread(value)
        if spread is not None:
            low, median, high, n = spread
            found.figures[path] = _figure(path, median, low, high, n, simulated, unit)
            value = {key: each for key, each in value.items() if key not in (*_SPREAD, "n", "samples")}
        for key, each in value.items():
            if key in _EXPLAINING:
                continue
            if key in SETTINGS and not isinstance(each, dict | list):
                found.settings[*path, key] = each
            else:
                _walk(each, (*path, key), simulated, unit, found)
    elif isinstance(value, list):
        for label, each in _labelled(value):
            _walk(each, (*path, label), simulated, unit, found)
    else:
        plain = number(value)
        if plain is not None:
            found.figures[path] = _figure(path, plain, plain, plain, 0, simulated, None)


def _spread(value: dict[str, Any]) -> tuple[float, float, float, int] | None:
    """(min, median, max, samples) of a dict that has them in order."""
    median, low, high = (number(value.get(name)) for name in _SPREAD)
    samples = number(value.get("n", value.get("samples", 1)))
    if median is None or low is None or high is None or samples is None or not low <= median <= high:
        return None
    return low, median, high, max(int(samples), 1)


def _figure(path: Path, value: float, low: float, high: float, n: int, simulated: bool, unit: str | None) -> Figure:
    better = direction(path)
    if better is None and n and unit in _TIMES:
        better = "less"
    rival = any(part.startswith(RIVALS) for part in path) and "ratio_to" not in path and "ratios" not in path
    return Figure(value, low, high, n, better, rival, simulated, any(part in MACHINE for part in path))


def _labelled(rows: list[Any]) -> Iterator[tuple[str, Any]]:
    """Each row with its label: its settings where they tell all rows apart, else its number."""
    if rows and all(isinstance(row, dict) for row in rows):
        labels = [
            " ".join(f"{key}={each}" for key, each in row.items() if key in LABELS and _scalar(each)) for row in rows
        ]
        if all(labels) and len(set(labels)) == len(labels):
            return zip(labels, rows, strict=True)
    return ((str(index), row) for index, row in enumerate(rows))


def _scalar(value: object) -> bool:
    return isinstance(value, str | int | float)
