"""Cost growth: exponents are those of the law, KV caches cost where they lie, the report says what is simulated."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

import benchmarks.growth.__main__ as command
from benchmarks.figures import contents
from benchmarks.growth.axes import AXES, BASE, SMOKE_BASE, along
from benchmarks.growth.decoding import GrownSimulation, Recorder
from benchmarks.growth.fits import MEASURED, fit, fits, points
from benchmarks.growth.measure import measure
from benchmarks.growth.plots import PICTURES, draw
from benchmarks.growth.report import report
from benchmarks.reporting import write_result
from benchmarks.servers.routing import generate
from benchmarks.servers.simulation import Steps
from moe_offload.scheduling.memory_share import MemoryShare
from moe_offload.scheduling.policies import find_policy

STEPS = Steps(2, 2, 2)
SERVER = "gtx1080ti"


@settings(deadline=None, max_examples=50)
@given(st.floats(-3, 3), st.floats(1e-6, 1e6), st.integers(3, 9))
def test_the_exponent_of_a_law_is_found(exponent: float, factor: float, count: int) -> None:
    grown = [8.0 * 2**n for n in range(count)]
    found = fit(grown, [factor * x**exponent for x in grown])
    assert found is not None
    assert found.exponent == pytest.approx(exponent, abs=1e-6) and found.upper == pytest.approx(exponent, abs=1e-6)


def test_the_upper_half_sees_what_a_fixed_cost_hides() -> None:
    grown = [2.0**n for n in range(10)]
    found = fit(grown, [100 + x for x in grown])
    assert found is not None and found.exponent < 0.3 < 0.45 < found.upper and found.r2 < 0.9
    assert fit(grown[:2], grown[:2]) is None and fit(grown, [0.0] * 10) is None
    with pytest.raises(ValueError, match="3 points have 2 figures"):
        fit([1, 2, 3], [1, 2])


def test_one_thing_grows_along_an_axis() -> None:
    for axis, values in AXES.items():
        cells = along(axis, BASE, AXES)
        assert tuple(getattr(cell, axis) for cell in cells) == values
        assert {replace(cell, **{axis: getattr(BASE, axis)}) for cell in cells} == {BASE}
    assert (AXES["experts"][0], AXES["experts"][-1], AXES["layers"][0], AXES["layers"][-1]) == (8, 1024, 16, 96)
    assert (AXES["batch"][0], AXES["batch"][-1], AXES["context"][-1]) == (1, 256, 128 << 10)
    with pytest.raises(ValueError, match="nothing grows along 'width'"):
        along("width", BASE, AXES)


def test_a_kv_cache_costs_where_it_lies_and_more_of_it_costs_more() -> None:
    def seconds(context: int, on_device: bool) -> float:
        cell = replace(SMOKE_BASE, context=context)
        share = MemoryShare((on_device,) * cell.layers, 32)
        choices = generate(cell.shape, cell.batch, STEPS.total)
        made = GrownSimulation(SERVER, cell, share, find_policy("static"), choices, STEPS.seen)
        made.step()
        began, host = made.accelerator.now(), made.accelerator.busy["host"]
        made.step()
        reads = cell.context * cell.batch * cell.shape.kv_bytes / (made.profile.host_read_gbs * 1e9)
        if not on_device:
            assert made.accelerator.busy["host"] - host >= reads
        return made.accelerator.now() - began

    assert seconds(65536, True) > 1.5 * seconds(1024, True)
    assert seconds(65536, False) > 1.5 * seconds(1024, False)
    assert seconds(65536, False) > seconds(65536, True)  # that card's memory is faster than its host's


def test_the_planner_is_timed_on_the_latest_states() -> None:
    cell = SMOKE_BASE
    recorder = Recorder(find_policy("ours").planner, 6)
    policy = replace(find_policy("ours"), planner=recorder)
    choices = generate(cell.shape, cell.batch, STEPS.total)
    made = GrownSimulation(SERVER, cell, MemoryShare((True,) * cell.layers, 16), policy, choices, STEPS.seen)
    for _ in range(3):
        made.step()
    assert [state.layer for state, _ in recorder.seen] == [2, 3, 0, 1, 2, 3]


def test_a_cell_has_all_figures_and_more_experts_need_more_tables() -> None:
    small, large = (measure(SERVER, replace(SMOKE_BASE, experts=count), STEPS, 1) for count in (8, 256))
    for name in MEASURED:
        assert points("experts", [small, large], name)[1][0] > 0
    assert large["measured"]["scheduler_bytes"] > 1.5 * small["measured"]["scheduler_bytes"]
    assert small["simulated"]["slots"] == 8 * SMOKE_BASE.layers  # all of them
    assert large["weights_gb"] == pytest.approx(32 * small["weights_gb"], rel=0.01)


def test_a_model_that_does_not_fit_has_no_figures() -> None:
    found = measure(SERVER, replace(SMOKE_BASE, layers=400), STEPS, 1)
    assert found["measured"] is None and found["simulated"] is None and found["weights_gb"] > 0
    assert points("layers", [found], "plan_us") == ([], [])


def test_the_command_writes_result_report_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "AXES", {"experts": (8, 32), "layers": (2, 3, 400)})
    monkeypatch.setattr(command, "BASE", SMOKE_BASE)
    monkeypatch.setattr(command, "STEPS", STEPS)
    monkeypatch.setattr(command, "DOCS", tmp_path)
    write = write_result
    monkeypatch.setattr(command, "write_result", lambda name, result: write(name, result, tmp_path))
    app = Typer()
    app.command()(command.main)
    assert CliRunner().invoke(app, ["--rounds", "1"], catch_exceptions=False).exit_code == 0
    written: dict[str, Any] = json.loads((tmp_path / "growth.json").read_text())
    text = (tmp_path / "growth.md").read_text()
    assert text == report(written, {axis: fits(axis, cells) for axis, cells in written["axes"].items()})
    assert "**simulated**" in text and "virtual gtx1080ti" in text and "does not fit" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == sum(len(cells) + 2 for cells in written["axes"].values()) + 2 + len(MEASURED) + 1
    figures, cell = contents(written).figures, ("axes", "experts", "experts=8 layers=4 batch=2 context=1024")
    speed, plan = figures[*cell, "simulated", "tokens_per_s"], figures[*cell, "measured", "plan_us"]
    assert speed.simulated and speed.better == "more"
    assert not plan.simulated and plan.better == "less" and plan.n == 1
    pytest.importorskip("matplotlib")
    pictures = sorted((tmp_path / "plots").glob("*.svg"))
    assert [each.stem for each in pictures] == sorted(PICTURES)
    again = {file.name: file.read_bytes() for file in draw(written, tmp_path / "again")}
    assert again == {file.name: file.read_bytes() for file in pictures}


def test_unknown_axes_and_servers_are_refused() -> None:
    app = Typer()
    app.command()(command.main)
    for arguments in (["--axis", "width"], ["--server", "gtx1080"], ["--nonsense"], ["--rounds", "0"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
