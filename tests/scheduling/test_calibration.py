import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.scheduling.calibration import POINTS, calibrate, fit_link
from moe_offload.scheduling.cost_cache import VERSION, cached_costs, machine_key
from moe_offload.scheduling.cost_model import CostModel
from moe_offload.transfer.accelerator import Accelerator, OutOfDeviceMemoryError, Work
from moe_offload.transfer.server_profile import PROFILES, ServerProfile, find_profile
from moe_offload.transfer.virtual import VirtualAccelerator

Kind = tuple[str, int, int]  # name, bytes, operations per row
BF16: Kind = ("bf16 2048x768", 9_437_184, 9_437_184)
INT4: Kind = ("int4 2048x768", 2_654_208, 9_437_184)
MIXTRAL: Kind = ("bf16 4096x14336", 352_321_536, 352_321_536)


class Bench:
    """Experts that take the time that the profile says, two kernels each."""

    def __init__(self, accelerator: Accelerator, kinds: Sequence[Kind]) -> None:
        self.accelerator = accelerator
        self.sizes = {kind: (nbytes, flops) for kind, nbytes, flops in kinds}
        self.slot, self.out = accelerator.allocate(4096, "slot"), accelerator.allocate(4096, "out")
        arena = accelerator.host_arena(4096)
        host = arena.take(4096, "weights")
        host.host(write=True)
        accelerator.copy_in(self.slot, host, accelerator.compute)

    def kinds(self) -> Sequence[tuple[str, int]]:
        return [(kind, nbytes) for kind, (nbytes, _) in self.sizes.items()]

    def run_cpu(self, kind: str, rows: list[int]) -> None:
        self.accelerator.run_host(lambda: None, Work(*self.sizes[kind], rows))

    def run_gpu(self, kind: str, rows: list[int]) -> None:
        nbytes, flops = self.sizes[kind]
        for count in rows:
            work = Work(nbytes, flops, (count,), launches=2)
            self.accelerator.launch(self.accelerator.compute, _nothing, [self.slot], [self.out], work)


def _nothing(*_: object) -> None:
    pass


def measured(
    profile: ServerProfile, kinds: Sequence[Kind], *, budget: int | None = None, ghost: bool = True, seed: int = 0
) -> tuple[CostModel, float]:
    """The model, and how long it took on the server's clock."""
    with VirtualAccelerator(profile, budget, ghost=ghost, seed=seed) as accelerator:
        bench = Bench(accelerator, kinds)
        used, started = accelerator.used, accelerator.now()
        model = calibrate(accelerator, bench)
        assert accelerator.used == used
        return model, accelerator.now() - started


def assert_true(model: CostModel, profile: ServerProfile, kind: Kind, within: float) -> None:
    name, nbytes, flops = kind
    costs = model.layer_costs(name)
    cpu = [profile.host_seconds(Work(nbytes, flops, [n] * 8)) - profile.host_job_seconds for n in POINTS]
    # where kernels are shorter than their launches, the device waits for the host
    gpu = [
        max(profile.device_seconds(Work(nbytes, flops, [n], launches=2)), 2 * profile.launch_seconds) for n in POINTS
    ]
    np.testing.assert_allclose(costs.cpu[list(POINTS)], np.array(cpu) / 8, rtol=within)
    np.testing.assert_allclose(costs.gpu[list(POINTS)], gpu, rtol=within)
    assert costs.copy == pytest.approx(profile.copy_seconds(nbytes), rel=within)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_the_costs_of_a_server_are_found(name: str) -> None:
    profile = find_profile(name)
    model, took = measured(profile, [BF16, INT4])
    for kind in (BF16, INT4):
        assert_true(model, profile, kind, 0.035)
    assert model.cpu_start == pytest.approx(profile.host_job_seconds, rel=0.01)
    assert 0 < model.gpu_start <= 2 * profile.launch_seconds + 2 * profile.kernel_seconds
    assert model.latency == pytest.approx(profile.link_latency, rel=0.01)
    assert model.bytes_per_second == pytest.approx(profile.link_gbs * 1e9, rel=0.01)
    assert profile.launch_seconds < model.join < 10 * profile.launch_seconds
    assert took < 3.5


@pytest.mark.parametrize("seed", range(4))
def test_also_where_times_scatter_by_a_fifth(seed: int) -> None:
    profile = replace(find_profile("v100-6230r"), jitter=0.2)
    model, took = measured(profile, [INT4], seed=seed)
    assert_true(model, profile, INT4, 0.15)
    assert model.cpu_start == pytest.approx(profile.host_job_seconds, abs=15e-6)
    assert took < 3.5


def test_experts_too_large_for_the_time_are_measured_at_few_points() -> None:
    profile = find_profile("v100-6230r")
    with VirtualAccelerator(profile, ghost=True) as accelerator:
        bench = Bench(accelerator, [MIXTRAL])
        started = accelerator.now()
        model = calibrate(accelerator, bench, seconds=1.0)
        # what the first runs took is not counted
        warm_up = profile.host_seconds(Work(MIXTRAL[1], MIXTRAL[2], [POINTS[-1]]))
        assert accelerator.now() - started < 1.5 + warm_up
    costs = model.layer_costs(MIXTRAL[0])
    for rows, within in ((1, 0.02), (100, 0.6), (512, 0.02), (1000, 0.6)):
        truth = profile.host_seconds(Work(MIXTRAL[1], MIXTRAL[2], [rows])) - profile.host_job_seconds
        assert costs.cpu[rows] == pytest.approx(truth, rel=within)


def test_calibration_on_real_data_is_the_same() -> None:
    profile = find_profile("t4")
    with_data, _ = measured(profile, [INT4], budget=8 << 20, ghost=False)
    without, _ = measured(profile, [INT4], budget=8 << 20)
    assert with_data.to_dict() == without.to_dict()


def test_progress_is_told() -> None:
    said: list[tuple[str, int, int]] = []
    with VirtualAccelerator(find_profile("t4"), ghost=True) as accelerator:
        calibrate(accelerator, Bench(accelerator, [INT4]), lambda *step: said.append(step))
    assert said == [("measuring this machine", done, 3) for done in range(4)]


def test_it_needs_a_kind_and_room_for_one_expert() -> None:
    with VirtualAccelerator(find_profile("t4"), 1 << 20, ghost=True) as accelerator:
        with pytest.raises(ValueError, match="no kind of expert"):
            calibrate(accelerator, Bench(accelerator, []))
        with pytest.raises(OutOfDeviceMemoryError, match="calibration"):
            calibrate(accelerator, Bench(accelerator, [INT4]))


@given(st.floats(0, 1e-3), st.floats(1e8, 1e11))
@settings(deadline=None, max_examples=50)
def test_a_link_is_fitted_exactly(latency: float, rate: float) -> None:
    sizes = [1 << 16, 1 << 18, 3_000_000, 1 << 26]
    found_latency, found_rate = fit_link(sizes, [latency + size / rate for size in sizes])
    assert found_latency == pytest.approx(latency, rel=1e-3, abs=1e-9)
    assert found_rate == pytest.approx(rate, rel=1e-3)


def test_a_link_that_noise_made_senseless_still_gets_a_rate() -> None:
    latency, rate = fit_link([1000, 2000], [2e-6, 1e-6])
    assert latency >= 0
    assert 0 < rate < float("inf")
    latency, rate = fit_link([1000, 1 << 20], [1e-9, 1e-3])  # the small copy too fast
    assert latency == 0


KEY = machine_key("Xeon", "T4, driver 580", 8, [("int4 2048x768", 2_654_208)])


def costs() -> CostModel:
    model = CostModel(1e-5, 12e9)
    model.add("int4 2048x768", 2_654_208, {1: 5e-5}, {1: 5e-6})
    return model


def test_costs_are_measured_once(tmp_path: Path) -> None:
    made = []

    def make() -> CostModel:
        made.append(costs())
        return made[-1]

    folder = tmp_path / "new" / "costs"
    assert cached_costs(KEY, make, folder) is made[0]
    again = cached_costs(KEY, make, folder)
    assert len(made) == 1
    assert again.to_dict() == made[0].to_dict()
    for other in (
        machine_key("Zen", "T4, driver 580", 8, [("int4 2048x768", 2_654_208)]),
        machine_key("Xeon", "T4, driver 590", 8, [("int4 2048x768", 2_654_208)]),
        machine_key("Xeon", "T4, driver 580", 9, [("int4 2048x768", 2_654_208)]),
        machine_key("Xeon", "T4, driver 580", 8, [("int4 2048x768", 2_654_209)]),
    ):
        cached_costs(other, make, folder)
    assert len(made) == 5
    assert len(list(folder.iterdir())) == 5  # and nothing left over


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff" + text,
        lambda text: b"[" * 100_000,
        lambda text: b"null",
        lambda text: text.replace(b'"version": %d' % VERSION, b'"version": %d' % (VERSION + 1)),
        lambda text: text.replace(b"Xeon", b"Zion"),
        lambda text: text.replace(b"1e-05", b"-1e-05"),
    ],
)
def test_a_damaged_file_is_measured_anew_and_replaced(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    cached_costs(KEY, costs, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    made = []
    cached_costs(KEY, lambda: made.append(1) or costs(), tmp_path)  # type: ignore[func-returns-value]
    assert made == [1]
    assert json.loads(path.read_bytes()) == json.loads(whole)


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cached_costs(KEY, costs, tmp_path / "file").kinds == ("int4 2048x768",)
    assert os.listdir(tmp_path) == ["file"]
