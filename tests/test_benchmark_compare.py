"""The comparison of results: planted slowdowns are found, noise is not, odd files get one clear line."""

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner, Result

from benchmarks.compare import NothingToCompareError, compare, main, parse
from benchmarks.figures import contents, direction
from benchmarks.reporting import FORMAT, RESULTS, commit, spread, write_result

FILES = sorted(RESULTS.glob("*.json"))
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gb": 25, "system": "Linux", "torch": "2.13.0"}

app = Typer()
app.command()(main)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def result(figures: dict[str, Any], **about: Any) -> dict[str, Any]:
    return {"format": FORMAT, "benchmark": "b", "machine": MACHINE, **about, **figures}


def verdict(old: dict[str, Any], new: dict[str, Any], threshold: float = 0.05) -> str:
    rows = compare(result(old), result(new), threshold).rows
    assert len(rows) == 1
    return rows[0].verdict


def scaled(values: Any, factor: float) -> Any:
    """All numbers of a spread, or a number."""
    return (
        {k: v if k == "n" else v * factor for k, v in values.items()} if isinstance(values, dict) else values * factor
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_result_is_no_worse_than_itself(file: Path) -> None:
    found = parse(file.read_text(), file.name)
    comparison = compare(found, copy.deepcopy(found), 0.05)
    assert not comparison.worse and not comparison.lost and not comparison.added
    assert any(row.verdict == "same" for row in comparison.rows)  # something is judged in each of them


# benchmark, path of a figure, what to multiply it with
PLANTED = [
    ("decode", ("moe_offload", "decode_tokens_per_s"), 0.7),
    ("decode", ("moe_offload", "prefill_tokens_per_s"), 0.5),
    ("cold_start", ("moe_offload", "load"), 1.3),
    ("loading", ("moe_offload", "anon"), 1.5),
    ("memory_budget", ("tokens_per_s", "moe_offload int4"), 0.7),
    ("cpu_attention", ("rows", 0, "median"), 1.5),
    ("cpu_experts", ("tiers", "native", "formats", "bf16", 0, "us"), 1.4),
    ("accuracy", ("rows", 3, "perplexity"), 1.2),
    ("first_use", ("tiers", "native", "int4", "compile_s"), 1.5),
    ("peers_qwen3_4", ("rows", "int4", "tests", "pp128", "tokens_per_s", "moe_offload"), 0.3),
    ("predictor_cost", ("cells", 0, "predict_us"), 2.0),
    ("planner", ("planning_us", "64"), 2.0),
    ("kv_share", ("cells", 2, "ours", "saved"), 0.8),
    ("servers", ("decode", 7, "simulated", "ours", "tokens_per_s"), 0.98),
    ("prefetch", ("cells", 3, "simulated", "learned", "ms_per_step"), 1.02),
    ("device", ("rows", 0, "tokens_per_s_with_prefill"), 0.95),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "factor"), PLANTED, ids=lambda each: each if isinstance(each, str) else "")
def test_a_planted_slowdown_is_found(name: str, path: tuple[Any, ...], factor: float) -> None:
    old, new = read(name), read(name)
    place: Any = new
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = scaled(place[path[-1]], factor)
    if path[-1] == "median":  # a spread among other figures: its greatest is far above
        place["max"] = max(place["max"], place["median"])
    found = compare(old, new, 0.05)
    assert [row.verdict for row in found.rows].count("worse") == 1
    turned = compare(new, old, 0.05)
    assert not turned.worse and [row.verdict for row in turned.rows].count("better") == 1


def test_what_changes_within_the_noise_is_the_same() -> None:
    samples = [10.0, 10.4, 11.0, 9.8, 30.0]  # one disturbed
    assert verdict({"us": spread(samples)}, {"us": spread([each * 1.04 for each in samples])}) == "same"
    assert verdict({"us": spread(samples)}, {"us": spread([each * 1.09 for each in samples])}) == "worse"
    loud = [6.0, 10.0, 14.0]
    assert verdict({"us": spread(loud)}, {"us": spread([each * 1.3 for each in loud])}) == "same"
    assert verdict({"us": spread(loud)}, {"us": spread([each * 1.8 for each in loud])}) == "worse"


def test_few_samples_and_plain_figures_need_twice_the_threshold() -> None:
    for old in (100.0, spread([100.0]), spread([100.0, 100.0])):
        assert verdict({"us": old}, {"us": scaled(old, 1.09)}) == "same"
        assert verdict({"us": old}, {"us": scaled(old, 1.11)}) == "worse"
    assert verdict({"us": spread([100.0] * 3)}, {"us": spread([109.0] * 3)}) == "worse"


def test_simulated_figures_have_no_noise() -> None:
    old, new = ({"simulated": {"tokens_per_s": each}} for each in (100.0, 98.0))
    assert verdict(old, new) == "worse"
    rows = [{"rows": {"simulated": True, "tokens_per_s": each}} for each in (100, 98)]
    assert verdict(rows[0], rows[1]) == "worse"
    assert verdict(old["simulated"], new["simulated"]) == "same"


def test_names_say_which_way_is_better() -> None:
    assert direction(("decode", "tokens_per_s", "moe_offload")) == "more"
    assert direction(("cells", "ours", "seconds")) == "less"
    assert direction(("rows", "gb_per_s")) == "more" and direction(("compile_s",)) == "less"
    assert direction(("read_limit_gb_per_s",)) is None and direction(("seen",)) is None
    assert direction(("nobody", "knows")) is None
    found = compare(result({"us": 1, "knows": 2}), result({"us": 1, "knows": 9}), 0.05)
    assert {row.path[-1]: row.verdict for row in found.rows} == {"us": "same", "knows": "not judged"}


def test_rivals_are_no_regressions_but_ratios_to_them_are() -> None:
    def figures(ours: float, theirs: float) -> dict[str, Any]:
        rates = {"moe_offload": ours, "llama.cpp": theirs}
        return result({"tokens_per_s": rates, "ratio_to": {"llama.cpp": ours / theirs}})

    assert not compare(figures(10, 10), figures(10, 5), 0.05).worse
    found = compare(figures(10, 10), figures(10, 20), 0.05)
    assert [row.verdict for row in found.rows] == ["same", "rival", "worse"]


def test_rows_are_told_apart_by_their_settings_not_by_their_order() -> None:
    old = {"rows": [{"batch": 1, "us": 10}, {"batch": 4, "us": 30}]}
    new = {"rows": [{"batch": 4, "us": 31}, {"batch": 16, "us": 90}, {"batch": 1, "us": 20}]}
    found = compare(result(old), result(new), 0.05)
    assert {row.path[1]: row.verdict for row in found.rows} == {"batch=1": "worse", "batch=4": "same"}
    assert found.added == (("rows", "batch=16", "us"),) and not found.lost


def test_figures_of_other_settings_are_not_compared() -> None:
    old = {"threads": 2, "a": {"layers": 4, "us": 10}, "b": {"layers": 4, "us": 10}}
    new = {"threads": 2, "a": {"layers": 6, "us": 15}, "b": {"layers": 4, "us": 15}}
    found = compare(result(old), result(new), 0.05)
    assert {row.path[0]: row.verdict for row in found.rows} == {"a": "other settings", "b": "worse"}
    assert found.warnings == ("other settings in a: layers was 4, is 6",)
    assert not compare(result(old), result({**new, "threads": 1}), 0.05).worse


def test_a_machine_that_reads_faster_is_named() -> None:
    old, new = ({"read_limit_gb_per_s": each, "us": 5} for each in (30.0, 40.0))
    assert "read_limit_gb_per_s was 30, is 40" in compare(result(old), result(new), 0.05).warnings[0]
    assert not compare(result(old), result(old), 0.05).warnings


def test_other_versions_are_a_note_and_other_machines_are_refused() -> None:
    old = result({"us": 1})
    newer = result({"us": 2}, machine={**MACHINE, "torch": "2.14.0"})
    assert compare(old, newer, 0.05).warnings == ("torch was 2.13.0, is 2.14.0",)
    other = result({"us": 2}, machine={**MACHINE, "cores": 8})
    with pytest.raises(NothingToCompareError, match="cores was 2 and is 8: measure both on one, or give --anyway"):
        compare(old, other, 0.05)
    assert compare(old, other, 0.05, anyway=True).worse


def test_one_clear_line_for_what_cannot_be_compared(tmp_path: Path) -> None:
    good, later, odd = (tmp_path / name for name in ("good.json", "later.json", "odd.json"))
    good.write_text(json.dumps(result({"us": 1})))
    later.write_text(json.dumps(result({"us": 1}, format=FORMAT + 1)))
    cases = {
        "{": "odd.json is not JSON", "[" * 100_000: "odd.json is not JSON", "[1]": "does not say of which machine",
        '{"machine": 3}': "does not say of which machine",
        json.dumps(result({"us": 1}, benchmark="other")): "two benchmarks: 'b' and 'other'",
        json.dumps(result({"text": "none"})): "no figure in common",
    }  # fmt: skip
    for text, said in cases.items():
        odd.write_text(text)
        found = run(good, odd)
        assert found.exit_code == 2 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr
    odd.write_bytes(b"\xff\xfe")
    for arguments, said in (
        ((good, odd), "cannot be read"), ((good, tmp_path / "none.json"), "cannot be read"),
        ((good, later), f"format {FORMAT + 1}, this version of the program reads {FORMAT}"),
        ((good,), "got 1"), ((good, good, good), "got 3"), (("--git", "HEAD", good), "good.json at HEAD"),
    ):  # fmt: skip
        found = run(*arguments)
        assert found.exit_code == 2 and said in found.stderr and found.stderr.count("\n") == 1, found.stderr
    assert run(good, good, "--nonsense").exit_code == 2


def test_the_command_ends_with_one_when_something_is_worse(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(result({"[red]us": {"us": 10.0}, "other": 1})))
    new.write_text(json.dumps(result({"[red]us": {"us": 20.0}, "other": 1})))
    worse, better = run(old, new), run(new, old)
    assert (worse.exit_code, better.exit_code) == (1, 0)
    assert "[red]us / us" in worse.stdout and "2.000" in worse.stdout and "1 worse" in worse.stdout
    assert "not judged, nobody said which way is better: other" in worse.stdout
    assert run(old, new, "--threshold", 60).exit_code == 0


def test_committed_results_against_the_working_copy(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        user = ("-c", "user.name=n", "-c", "user.email=n@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *user, *arguments], cwd=tmp_path, check=True, capture_output=True)

    file = tmp_path / "results" / "b.json"
    file.parent.mkdir()
    file.write_text(json.dumps(result({"us": 10.0})))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert "no result differs" in run("--git", "HEAD", file).stdout
    file.write_text(json.dumps(result({"us": 20.0})))
    found = run("--git", "HEAD", file)
    assert found.exit_code == 1 and "b.json since HEAD" in found.stdout
    assert run("--git", "no-such", file).exit_code == 2


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["median", "min", "max", "n", "us", "batch", "unit", "rows", ""]), inner)
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=8), ODD), st.dictionaries(st.text(max_size=8), ODD))
def test_odd_results_are_compared_or_refused(one: dict[str, Any], other: dict[str, Any]) -> None:
    old, new = ({**each, "format": FORMAT, "benchmark": "b", "machine": MACHINE} for each in (one, other))
    old, new = (parse(json.dumps(each), "odd") for each in (old, new))
    for left, right in ((old, new), (old, old)):
        try:
            found = compare(left, right, 0.05)
        except NothingToCompareError:
            continue
        assert all(row.change == row.change for row in found.rows)  # no NaN
        assert left is not right or not found.worse


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=9), st.floats(3.0, 100.0))
def test_better_is_worse_turned_around(samples: list[float], factor: float) -> None:
    one, other = spread(samples), spread([each * factor for each in samples])
    for name in ("us", "tokens_per_s"):
        there, back = verdict({name: one}, {name: other}), verdict({name: other}, {name: one})
        assert {there, back} in ({"worse", "better"}, {"same"})


def test_a_written_result_says_its_format_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(write_result("b", {"us": 1}, tmp_path).read_text())
    assert (written["format"], written["benchmark"], written["us"]) == (FORMAT, "b", 1)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", written["commit"])
    assert contents(written).figures.keys() == {("us",)}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"
