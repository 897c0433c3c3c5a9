"""The comparison on legacy servers: sums by hand, bounds that bound, runs that go on, goals that are told right."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.legacy_servers import __main__ as command
from benchmarks.legacy_servers.bound import Bound, bound_of, fewest_misses, step_bound
from benchmarks.legacy_servers.contestants import CONTESTANTS, KNOWING, NAMES, OURS, STATICS
from benchmarks.legacy_servers.goals import goals_of, hybrimoe_in_its_engine
from benchmarks.legacy_servers.journal import Journal, code_version, missing
from benchmarks.legacy_servers.published import CONSTANTS, FIGURES, slots_of
from benchmarks.legacy_servers.recall import MadeUp, name
from benchmarks.legacy_servers.report import BEGIN, END, generated, put_between_markers
from benchmarks.legacy_servers.rule_times import costs_of, hottest, layer_time, step_time
from benchmarks.legacy_servers.settings import (
    MODELS,
    PAPER_SERVER,
    WEIGHTS,
    Cell,
    cells,
    fits_host,
    held,
    shape_of,
)
from benchmarks.legacy_servers.simulated import Contest, Outcome, contest
from benchmarks.legacy_servers.validation import Check, constants_of, server_of
from benchmarks.servers.routing import Choices, generate
from benchmarks.servers.shapes import Shape, deepseek, qwen3
from benchmarks.servers.simulation import CONTEXT, Steps
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.scheduling.layer_plan import LayerCosts, Planner
from moe_offload.scheduling.policies import POLICIES, plan_fiddler, plan_lru, plan_static, plan_tokens
from moe_offload.transfer.server_profile import PROFILES, find_profile

SMALL = Shape("small", 4, 16, 2, ExpertRecord(2048, 768, "int4"), 4 * 10_000_000, 20_000_000, 4096, repeats=0.3)
STEPS = Steps(6, 2, 3)
CELL = Cell("p100", "Qwen3-30B-A3B", "int4", 4, 24, STEPS)  # its names stand for SMALL where a shape is given
# A millisecond for each row on the CPU, 3 for a copy, 1 for any expert on the card.
COSTS = LayerCosts(np.arange(65, dtype=np.float64) * 1e-3, np.r_[0.0, np.full(64, 1e-3)], 3e-3)


@pytest.fixture(scope="module")
def choices() -> Choices:
    return generate(SMALL, 4, STEPS.total)


# Validation


@pytest.mark.parametrize(
    ("planner", "rows", "there", "at_once", "in_turn"),
    [
        # 10 rows take the CPU 10, a copy and the card 4: fetched; 1 row stays. The copy ends at 3, its expert at 4.
        (plan_fiddler, (1, 10), (False, False), 4, 1 + 3 + 1),
        (plan_fiddler, (1, 10, 2), (False, False, True), 4, 1 + 3 + 1 + 1),
        # after the first fetch (4 < 11) a second would end at 7, later than the CPU's rest of 1
        (plan_tokens, (10, 10, 1), (False, False, False), 11, 11 + 3 + 1),
        (plan_lru, (1, 1, 1), (False, False, True), 7, 2 * 3 + 3 * 1),
        (plan_static, (5, 6, 7), (False, True, False), 12, 12 + 1),
    ],
)
def test_a_layer_by_hand(
    planner: Planner, rows: Sequence[int], there: Sequence[bool], at_once: float, in_turn: float
) -> None:
    active = np.arange(len(rows), dtype=np.int32)
    found = layer_time(planner, COSTS, active, np.array(rows), np.array(there), sum(rows))
    assert found == pytest.approx((at_once * 1e-3, in_turn * 1e-3))


def test_a_step_by_hand() -> None:
    """One layer, one token, 6 experts: 0.95 ms each on the card; copied, 1.39 ms each and the last one's 0.95."""
    shape, server = replace(deepseek("bf16"), layers=1), find_profile(PAPER_SERVER)
    routing = np.tile(np.arange(6), (3, 1, 1, 1))
    around = (2 * (shape.dense_params + shape.head_params) + CONTEXT * shape.kv_bytes) / (0.65 * 900e9)
    constants = CONSTANTS[shape.name]
    all_there = step_time(server, shape, constants, plan_tokens, routing, 1, 6)
    assert all_there.hits == 1 and all_there.at_once == pytest.approx(around + 6 * 0.95e-3)
    assert all_there.in_turn == pytest.approx(all_there.at_once)
    none = step_time(server, shape, constants, plan_lru, routing, 1, 0)
    assert none.hits == 0
    assert none.at_once == pytest.approx(around + 6 * 1.39e-3 + 0.95e-3)
    assert none.in_turn == pytest.approx(around + 6 * (1.39e-3 + 0.95e-3))
    on_cpu = step_time(server, shape, constants, plan_static, routing, 1, 0)
    assert on_cpu.at_once == pytest.approx(around + 6 * 0.2041e-3)  # the measured table's first entry


def test_constants_are_of_bf16_alone() -> None:
    assert costs_of(qwen3("bf16"), CONSTANTS["Qwen3-30B-A3B"]).cpu[1] == pytest.approx(0.1637e-3)
    with pytest.raises(ValueError, match="int4 experts: only of bf16"):
        costs_of(qwen3("int4"), CONSTANTS["Qwen3-30B-A3B"])


def test_the_hottest_are_on_the_card() -> None:
    routing = np.array([[[[0, 1]], [[2, 3]]], [[[0, 2]], [[2, 3]]], [[[0, 2]], [[2, 1]]]])  # 3 steps, 2 layers
    assert hottest(routing, 4, 3).tolist() == [[True, False, True, False], [False, False, True, False]]


def test_published_figures_are_steps() -> None:
    seconds = {(f.card, f.model, f.batch, f.system): f.seconds for f in FIGURES}
    assert seconds["V100", "DeepSeek-V2-Lite", 4, "Fiddler"] == 1.34
    assert seconds["A100", "DeepSeek-V2-Lite", 64, "LayerScope"] == pytest.approx(64 / 37.4)
    assert slots_of("DeepSeek-V2-Lite", 4) == 993 and slots_of("DeepSeek-V2-Lite", 64) == 693
    assert slots_of("Qwen3-30B-A3B", 64) is None
    assert constants_of("A100", "Mixtral-8x7B").copy == pytest.approx(27e-3 * 12 / 25)
    assert server_of("A100").host_seconds is not None and server_of("A100").link_gbs == 25
    assert server_of("A100").expert_tables == find_profile(PAPER_SERVER).expert_tables


@pytest.mark.parametrize(("published", "error"), [(2.0, 0.0), (1.0, 0.5), (4.0, -0.25), (1.5, 0.0), (3.0, 0.0)])
def test_the_error_is_that_of_the_nearer_sum(published: float, error: float) -> None:
    found = Check("V100", "m", 4, "Fiddler", 10, True, 0.5, published, 1.5, 3.0, None)
    assert found.error == pytest.approx(error)
    assert found.to_dict()["error"] == found.error


# The physical bound


def brute(requests: Sequence[int], capacity: int) -> int:
    """Every first content, every decision."""
    every = sorted(set(requests))

    def least(at: int, inside: frozenset[int]) -> int:
        if at == len(requests):
            return 0
        key = requests[at]
        if key in inside:
            return least(at + 1, inside)
        choices = [inside] + [inside - {out} | {key} for out in inside]
        return 1 + min(least(at + 1, each) for each in choices)

    return min(least(0, frozenset(first)) for first in itertools.combinations(every, min(capacity, len(every))))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 3))
def test_no_cache_misses_less(requests: list[int], capacity: int) -> None:
    assert fewest_misses(requests, capacity) == brute(requests, capacity)


def test_the_bound_by_hand() -> None:
    server = replace(find_profile("p100"), memory_gbs=100.0, link_gbs=10.0, host_read_gbs=40.0)
    shape = replace(SMALL, record=ExpertRecord(1000, 1000, "f32"))
    expert = shape.expert_bytes / 1e9
    # 0.1 s on the card around, in which the link carries 1 GB of what is missed; the rest by link and CPU
    missed, active = 11 / expert, 12 / expert
    found = step_bound(server, shape, 10 * 10**9, active, missed, 8)
    assert found.limit == "link and CPU" and found.tokens_per_second == pytest.approx(8 / (0.1 + 10 / 50), rel=1e-4)
    found = step_bound(server, shape, 10 * 10**9, 28 / expert, 1 / expert, 8)
    assert found.limit == "card and CPU" and found.tokens_per_second == pytest.approx(8 / (0.1 + 28 / 140), rel=1e-4)
    assert step_bound(server, shape, 10 * 10**9, 1 / expert, 0, 8).limit == "card"


def test_nothing_missed_where_all_fit(choices: Choices) -> None:
    assert bound_of(find_profile("p100"), SMALL, choices, 64).missed == 0
    few = bound_of(find_profile("p100"), SMALL, choices, 8)
    assert 0 < few.missed <= few.active <= 64


# Made-up predictors


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.integers(0, 1000))
def test_k_experts_are_named_for_each_token(tokens: int, top_k: int, recall: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(9)[:top_k] for _ in range(tokens)])
    named = name(chosen, 9, recall, random)
    assert (named.sum(axis=1) == top_k).all()
    right = np.take_along_axis(named, chosen, axis=1)
    assert right.all() if recall == 1 else True
    assert not right.any() if recall == 0 else True


def test_recall_is_as_stated_and_its_probabilities_are_right() -> None:
    routing = generate(replace(SMALL, experts=32), 16, 40)
    for distance, stated in ((1, 0.8), (3, 0.7)):
        made = MadeUp(routing, 32, 0.8, 0.05)
        random = np.random.default_rng(0)
        found = [
            np.take_along_axis(name(routing[s, 2], 32, stated, random), routing[s, 2], axis=1).mean() for s in range(40)
        ]
        assert np.mean(found) == pytest.approx(stated, abs=0.03)
        said = [made.say(step, 2, distance) for step in range(40)]
        wanted = [np.bincount(routing[step, 2].ravel(), minlength=32) for step in range(40)]
        assert np.sum([rows for _, rows in said]) == pytest.approx(np.sum(wanted), rel=0.02)
        sure = np.concatenate([p for p, _ in said]) > stated - 1e-9
        came = np.concatenate([rows > 0 for rows in wanted])
        assert came[sure].mean() > stated - 0.03 and came[~sure].mean() < 0.5
        np.testing.assert_array_equal(made.say(3, 2, distance)[0], said[3][0])


# Cells


def test_a_cell_is_the_same_again_and_no_one_beats_physics(choices: Choices) -> None:
    server = find_profile("p100")
    first, again = (contest(CELL, server, SMALL, choices) for _ in range(2))
    assert first == again and tuple(first.speeds) == NAMES
    assert max(first.speeds.values()) <= first.bound.tokens_per_second
    assert first.busy["static"]["link"] == 0 and first.hits["lru"] != first.hits["static"]
    back = Outcome.from_dict(json.loads(json.dumps(first.to_dict())))
    assert back == first


def test_shared_runs_are_those_of_their_own(choices: Choices) -> None:
    """n-cpu-moe has the policy of another contestant, and another placement."""
    server = find_profile("p100")
    every = contest(CELL, server, SMALL, choices)
    for each in CONTESTANTS:
        alone = contest(CELL, server, SMALL, choices, (each,))
        assert alone.speeds[each.name] == every.speeds[each.name]
    assert every.speeds["n-cpu-moe"] != every.speeds["static-offload32"]


def test_whole_layers_are_placed_from_the_last_on(choices: Choices) -> None:
    server = find_profile("p100")
    layers = next(each for each in CONTESTANTS if each.whole_layers)
    made = Contest(server, SMALL, layers, "never", choices, STEPS.seen, 40)
    there = [int((made.cache.slot_of(layer) >= 0).sum()) for layer in range(4)]
    assert there == [0, 0, 16, 16]


def test_one_oracle_knows_the_next_call_alone(choices: Choices) -> None:
    far = {}
    for each in CONTESTANTS:
        if each.name in KNOWING:
            made = Contest(find_profile("p100"), SMALL, each, "never", choices, STEPS.seen, 24)
            forecast = made.dispatcher.parts.forecast
            far[each.name] = not np.array_equal(forecast.usual_presence(0, 4), forecast.presence(0, 4))
    assert far == {"oracle-next": False, "oracle": True}


def test_predictions_take_the_hosts_time(choices: Choices) -> None:
    contestant = next(each for each in CONTESTANTS if each.name == "ours-predictor")
    made = Contest(find_profile("p100"), SMALL, contestant, "recall", choices, STEPS.seen, 24)
    began = made.accelerator.now()
    made.predict()
    assert made.accelerator.now() - began == pytest.approx(60e-6 + 4 * 4e-6, rel=0.01)


def test_the_selection_of_cells() -> None:
    every = cells(list(PROFILES), MODELS, WEIGHTS)
    assert len({cell.key for cell in every}) == len(every)
    paper = [cell for cell in every if cell.server == PAPER_SERVER]
    assert {cell.model for cell in paper} == set(MODELS) and {cell.server for cell in every} == set(PROFILES)
    assert {cell.batch for cell in paper if cell.weights == "bf16"} == {1, 4, 8, 16, 32, 64}
    for cell in every:
        profile = PROFILES[cell.server]
        assert 0 < cell.slots <= held(profile, cell.shape, cell.batch) and fits_host(profile, cell.shape)
        assert cell.share <= 0.7
    assert not any(cell.model == "Mixtral-8x7B" and cell.weights == "bf16" and cell.share > 0.35 for cell in paper)
    assert not any(cell.server == "gtx1080ti" and cell.model == "gpt-oss-120b" for cell in every)  # 64 GB, 61 GB
    with pytest.raises(ValueError, match="has no bf16 experts here: it has mxfp4"):
        shape_of("gpt-oss-20b", "bf16")


# Runs that go on


def planted(cell: Cell, **speeds: float) -> Outcome:
    given_ = {name: speeds.get(name.replace("-", "_"), 1.0) for name in NAMES}
    return Outcome(
        cell, given_, {n: "never" for n in NAMES}, {n: 0.5 for n in NAMES}, {}, Bound(500.0, 9.0, 1.0, "card")
    )


def of_batches(*batches: int) -> list[Cell]:
    return [replace(CELL, batch=batch) for batch in batches]


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, calls = of_batches(1, 4, 16), []

    def simulated(cell: Cell) -> Outcome:
        calls.append(cell.batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return planted(cell, static=1.0 + cell.batch / 7)

    monkeypatch.setattr(command, "outcome", simulated)
    path = tmp_path / "below" / "journal.jsonl"
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        command.simulate(wanted, Journal(path, "v"), 1, said.append)
    with path.open("ab") as file:
        file.write(b'{"version": "v", "outc')  # killed while it wrote
    resumed = command.simulate(wanted, Journal(path, "v"), 1, said.append)
    assert calls == [16, 4, 1, 1] and any("2 of 3 cells are done" in line for line in said)
    whole = command.simulate(wanted, Journal(tmp_path / "other.jsonl", "v"), 1, said.append)
    results = [command.result_of([], each, goals_of(each)) for each in (resumed, whole)]
    assert json.dumps(results[0]) == json.dumps(results[1])
    assert [outcome.cell.batch for outcome in resumed] == [1, 4, 16]


def test_what_other_code_made_does_not_count(tmp_path: Path) -> None:
    path, cell = tmp_path / "journal.jsonl", CELL
    Journal(path, "old").add(planted(cell))
    assert Journal(path, "new").read() == {} and list(Journal(path, "old").read()) == [cell.key]
    assert missing([cell], Journal(path, "new").read()) == [cell]
    path.write_bytes(
        b'\xff\xfe\nnull\n[]\n{"version": "old", "outcome": {"cell": 3, "bound": 4}}\n' + path.read_bytes()
    )
    assert list(Journal(path, "old").read()) == [cell.key]


def test_the_version_is_that_of_the_code(tmp_path: Path) -> None:
    for folder in ("transfer", "docs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.py").write_text("a = 1\n")
    first = code_version.__wrapped__(tmp_path)
    (tmp_path / "docs" / "one.py").write_text("a = 2\n")
    assert code_version.__wrapped__(tmp_path) == first
    (tmp_path / "transfer" / "one.py").write_text("a = 2\n")
    assert code_version.__wrapped__(tmp_path) != first


# Goals and report


def in_paper(batch: int) -> Cell:
    return Cell(PAPER_SERVER, "Qwen3-30B-A3B", "bf16", batch, 2000, STEPS)


def test_goals_of_planted_results() -> None:
    outcomes = [
        planted(in_paper(4), ours_predictor=20, hybrimoe=10, oracle=30, static=9),  # twice: met
        planted(in_paper(8), ours_popularity=18.5, hybrimoe=15, oracle=20, static=9),  # 92.5 % of an oracle below twice
        planted(in_paper(16), ours_never=17, hybrimoe=15, oracle=20, static=9),  # 85 %: missed
        planted(in_paper(32), ours_never=19, hybrimoe=10, oracle=20, static=9),  # twice could be reached: missed
        planted(in_paper(1), ours_never=5, hybrimoe=10, oracle=20, fiddler=5.2),  # not the paper's setting; below
        planted(CELL, ours_never=9.95, n_cpu_moe=10, oracle=9),  # below by less than 1 %
    ]
    goals = goals_of(outcomes)
    assert [goal.met for goal in goals.paper] == [True, True, False, False]
    assert [goal.reachable for goal in goals.paper] == [True, False, False, True]
    assert [goal.over_hybrimoe for goal in goals.paper] == [2.0, 1.2333, 1.1333, 1.9]
    assert [(each.static, each.ratio) for each in goals.below] == [("fiddler", 0.9615)]
    assert goals.slightly == 1 and goals.cells == 6
    paper, engine, static = goals.lines()
    gains = [goal.over_its_engine for goal in goals.paper]
    own = [hybrimoe_in_its_engine(outcome.cell) for outcome in outcomes[:4]]
    assert gains == pytest.approx([20 / own[0], 18.5 / own[1], 17 / own[2], 19 / own[3]], abs=1e-4)
    assert f"at least 2x in {sum(gain >= 2 for gain in gains)} of 4" in engine and f"least {min(gains):.2f}x" in engine
    assert "MISSED, 2 of 4 cells: at least 2x HybriMoE in 1 (least 1.13x, most 2.00x)" in paper
    assert "MISSED, 1 of 6 cells more than 1% below (worst 0.962), 1 below by less" in static
    met = goals_of(outcomes[:2]).lines()
    assert ": met, 2 of 2" in met[0] and ": met, 0 of 2" in met[-1]
    assert "no cell" in goals_of([]).lines()[0] and set(OURS) | set(STATICS) <= set(NAMES)


def test_hybrimoe_in_an_engine_by_the_papers_constants() -> None:
    cell = in_paper(4)
    everything = cell.shape.layers * cell.shape.experts
    few, many, everywhere = (
        hybrimoe_in_its_engine(replace(cell, slots=slots)) for slots in (everything // 10, everything // 2, everything)
    )
    assert few < many < everywhere
    # the card alone: an expert's constant each; the CPU can take some of them
    active = 4 * cell.shape.top_k
    assert everywhere > cell.batch / (cell.shape.layers * active * CONSTANTS[cell.model].device + 1)


def test_the_report_takes_its_place() -> None:
    outcomes = [planted(in_paper(4), ours_never=17, hybrimoe=15, oracle=20, static=18), planted(CELL)]
    checks = [Check("V100", "Qwen3-30B-A3B", 64, "Klotski", 0, False, 0.0, 19.9, 4.65, 7.62, None)]
    text = generated(checks, outcomes, goals_of(outcomes), "A note.", {"x.svg": "A plot"})
    assert "| 19.90 | 4.65 to 7.62 | -62% |" in text and "![A plot](plots/x.svg)" in text and "0.944" in text
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    made = put_between_markers(document, text)
    assert made.startswith("before\n") and made.endswith("after\n") and "\nold\n" not in made
    assert put_between_markers(made, text) == made
    for broken in ("nothing", f"{END}{BEGIN}", document + document):
        with pytest.raises(ValueError, match="once each, in this order"):
            put_between_markers(broken, text)


def test_plots_say_that_they_are_simulated(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.legacy_servers.plots import draw

    titles = draw([planted(in_paper(batch), static=batch + 1.0) for batch in (4, 64)], tmp_path)
    assert set(titles) == {"legacy_shares.svg", "legacy_paper.svg"}
    for file in titles:
        assert "simulated, routing synthetic" in (tmp_path / file).read_text()
    assert set(draw([planted(CELL)], tmp_path / "other")) == {"legacy_shares.svg"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--server", "nope"], "no server is called nope"),
        (["--model", "llama"], "no model is called llama"),
        (["--weights", "q4"], "no weight format is called q4"),
        (["--server", "t4", "--weights", "bf16"], "no cell"),
        (["--jobs", "0"], "--jobs"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_told(options: list[str], said: str) -> None:
    app = typer.Typer()
    app.command()(command.main)
    found = CliRunner().invoke(app, options, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert found.exit_code == 2 and said in found.output


def test_every_policy_of_the_product_is_there() -> None:
    """Under a contestant's name, LayerScope's with its prefetch."""
    covered = {each.policy.planner for each in CONTESTANTS}
    assert {policy.planner for policy in POLICIES.values()} == covered
