"""What is missing or fails about a device: said with how to get it, and the CPU, unless the card was demanded."""

import gc
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import moe_offload
from moe_offload import device_choice, device_modules, expert_kernels
from moe_offload.cli import main
from moe_offload.device_modules import DeviceModules
from moe_offload.gpu_kernels.launch import KernelError
from moe_offload.transfer.accelerator import DeviceLostError, OutOfDeviceMemoryError
from moe_offload.transfer.cupy_check import CupyFacts
from moe_offload.transfer.find_device import CudaFacts
from moe_offload.transfer.virtual import VirtualAccelerator
from tests import cli_model, tiny_models
from tests.card_cases import CU126, CU130, card, put_in, see, warnings_in, working
from tests.conftest import Checkpoints
from tests.device_cases import budget, expected, generate

BAD, SMALL = moe_offload.OptionError, moe_offload.NotEnoughMemoryError
TORCH_OOM = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 10.91 GiB"
IDS = tiny_models.token_ids(1, 5)
PASCAL = card((6, 1))


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", num_experts=16)


def _bus(root: Path, *devices: tuple[str, str]) -> Path:
    """A system's files with PCI devices of (vendor, class)."""
    for at, (vendor, kind) in enumerate(devices):
        device = root / f"sys/bus/pci/devices/0000:0{at}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    return root


# What is there: facts, device -> what is said, and how loud

NVIDIA, OTHER = ("0x10de", "0x030000"), ("0x1002", "0x030000")
CASES: dict[str, tuple[CudaFacts, tuple[tuple[str, str], ...], str, list[str]]] = {
    "torch without CUDA, no card": (
        CudaFacts("2.13.0+cpu", None), (OTHER,), "info", ["2.13.0+cpu has no CUDA", "pip install"],
    ),
    "torch without CUDA, but a card": (
        CudaFacts("2.13.0+cpu", None), (OTHER, NVIDIA), "warning", ["2.13.0+cpu has no CUDA", "whl/cu126"],
    ),
    "no driver, no card": (
        CudaFacts("2.13.0", "13.0", trouble="Found no NVIDIA driver"), (), "info", ["Found no NVIDIA driver"],
    ),
    "a driver that does not start": (
        CudaFacts("2.13.0", "13.0", trouble="driver is too old"), (NVIDIA,), "warning",
        ["driver is too old", "CUDA 13.0", "nvidia-smi"],
    ),
    "a hidden card": (
        CudaFacts("2.13.0", "12.6", CU126), (NVIDIA,), "warning", ["sees no card", "CUDA_VISIBLE_DEVICES"],
    ),
    "a card older than Pascal": (
        CudaFacts("2.13.0", "12.6", CU126, (card((5, 2)),)), (), "warning",
        ["GTX 980", "capability 5.2", "Pascal (6.0) is the oldest"],
    ),
    "a torch that has dropped the card": (
        CudaFacts("2.13.0", "13.0", CU130, (PASCAL,)), (), "warning", ["1080 Ti", "6.1", "sm_75", "whl/cu126"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts, devices, loud, words = CASES[case]
    see(monkeypatch, facts)
    monkeypatch.setattr(device_choice, "_ROOT", _bus(tmp_path, *devices))
    with caplog.at_level(logging.INFO, "moe_offload"), moe_offload.load(folder).offload as engine:
        assert engine.device is None and generate(engine._model, IDS) == expected(folder, IDS)
    said = [record for record in caplog.records if "runs on the CPU" in record.getMessage()]
    assert [record.levelname.lower() for record in said] == [loud]
    assert all(word in said[0].getMessage() for word in words)
    with pytest.raises(BAD) as caught:
        moe_offload.load(folder, device="cuda")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    with pytest.raises(BAD, match="gpu_memory is given, but device='auto' uses no GPU") as caught:
        moe_offload.load(folder, gpu_memory="1GB")
    assert all(word in str(caught.value) for word in words)


def test_a_card_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, PASCAL)
    with pytest.raises(BAD, match=r"there is no cuda:3: cuda:0 is the only card"):
        moe_offload.load(folder, device="cuda:3")


# What fails while the model is put on a card

Failing = Callable[[int, int | None], VirtualAccelerator]


def _no_context(index: int, budget: int | None) -> VirtualAccelerator:
    raise OutOfDeviceMemoryError("GTX 1080 Ti (cuda:0) is out of memory: CUDA error: out of memory")


def _no_answer(index: int, budget: int | None) -> VirtualAccelerator:
    raise DeviceLostError("GTX 1080 Ti (cuda:0) does not answer any more: CUDA error: unknown error")


class _NoLockedMemory(VirtualAccelerator):
    def host_arena(self, nbytes: int) -> Any:
        raise MemoryError(f"the system locks 0 of {nbytes} bytes of host memory, then says CUDA_ERROR_OUT_OF_MEMORY")


class _LessThanItSays(VirtualAccelerator):
    def allocate(self, nbytes: int, name: str) -> Any:
        try:
            raise torch.OutOfMemoryError(TORCH_OOM)
        except RuntimeError as error:
            raise OutOfDeviceMemoryError(f"{self.name} is out of memory: {TORCH_OOM}") from error


def _of(kind: type[VirtualAccelerator]) -> Failing:
    return lambda index, budget: kind(working(index, budget).profile, budget)


def _attach_raises(error: Exception) -> Callable[..., None]:
    def attach(self: Any, model: Any, team: Any) -> None:
        raise error

    return attach


def _init_raises(error: Exception) -> Callable[..., None]:
    def init(self: Any, *_: Any) -> None:
        raise error

    return init


SIDE = "moe_offload.engine.DeviceSide"
OPENED: dict[str, tuple[Failing, type[Exception], list[str]]] = {
    "no context": (_no_context, SMALL, ["out of memory", "lower gpu_memory (--gpu-memory)", "device cpu"]),
    "no answer": (_no_answer, BAD, ["does not answer", "nvidia-smi", "moe-offload doctor"]),
    "no locked memory": (_of(_NoLockedMemory), SMALL, ["page-locked host memory", "locks 0 of", "lower ram (--ram)"]),
    "less than it says": (_of(_LessThanItSays), SMALL, ["20.00 MiB", "was given 11.3 GB", "lower gpu_memory"]),
}
PATCHED: dict[str, tuple[str, Any, type[Exception], list[str]]] = {
    "torch out of memory": (
        f"{SIDE}.attach", _attach_raises(torch.OutOfMemoryError(TORCH_OOM)), SMALL,
        ["out of memory", "20.00 MiB", "was given 11.3 GB", "lower gpu_memory (--gpu-memory)"],
    ),
    "the budget is too small": (
        f"{SIDE}.attach", _attach_raises(OutOfDeviceMemoryError("cache: 512 bytes asked for, 80 left of 900")), SMALL,
        ["512 bytes asked for, 80 left of 900", "raise gpu_memory (--gpu-memory)"],
    ),
    "lost": (
        f"{SIDE}.attach", _attach_raises(RuntimeError("CUDA error: an illegal memory access was encountered")), BAD,
        ["does not answer any more", "illegal memory access", "nvidia-smi"],
    ),
    "kernels": (
        f"{SIDE}.__init__", _init_raises(KernelError("experts.cu cannot be compiled: no such header")), BAD,
        ["experts.cu cannot be compiled", "moe-offload doctor"],
    ),
}  # fmt: skip
FAILURES = [*OPENED, *PATCHED]


def _arrange(case: str, patch: pytest.MonkeyPatch, capability: tuple[int, int] = (6, 1)) -> tuple[type, list[str]]:
    if case in OPENED:
        opened, kind, words = OPENED[case]
        put_in(patch, card(capability), opened)
        return kind, words
    put_in(patch, card(capability))
    where, what, kind, words = PATCHED[case]
    patch.setattr(where, what)
    return kind, words


@pytest.mark.parametrize("case", FAILURES)
def test_auto_ends_on_the_cpu_with_one_warning(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, words = _arrange(case, monkeypatch)
    with moe_offload.load(folder).offload as engine:
        _check_on_the_cpu(engine._model, folder)
        said = warnings_in(caplog)
        assert len(said) == 1 and said[0].endswith("; the model runs on the CPU")
        assert all(word in said[0] for word in words) and "\n" not in said[0]


@pytest.mark.parametrize("case", FAILURES)
def test_a_card_that_was_demanded_is_an_error(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, words = _arrange(case, monkeypatch)
    before = set(threading.enumerate())
    with pytest.raises(kind) as caught:
        moe_offload.load(folder, device="cuda")
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)
    del caught
    gc.collect()
    assert not [each for each in threading.enumerate() if each not in before]


def _check_on_the_cpu(model: PreTrainedModel, folder: Path) -> None:
    engine = model.offload
    assert engine.device is None and engine.stats() is None and "forward" not in model.__dict__
    assert engine.fused_layers == 3  # as with device="cpu"
    assert {each.device.type for each in model.parameters()} == {"cpu"}
    assert model.config._attn_implementation == "sdpa"
    assert generate(model, IDS) == expected(folder, IDS)
    engine.detach()  # finds all that it undoes


@pytest.mark.parametrize("case", ["no context", "less than it says", "lost"])
def test_then_bf16_is_not_converted_either(
    case: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The range was looked at for nothing, and the model is what device="cpu" makes of it."""
    bf16 = checkpoint("qwen3_moe", torch.bfloat16)
    _arrange(case, monkeypatch)
    with moe_offload.load(bf16).offload as engine:
        assert engine._model.dtype == torch.bfloat16 and engine.options.device == "cpu"
        _check_on_the_cpu(engine._model, bf16)
    assert len(warnings_in(caplog)) == 1 and "float16" not in warnings_in(caplog)[0]


def test_a_card_too_small_for_the_model_is_no_reason_to_look_at_weights(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bf16 = checkpoint("qwen3_moe", torch.bfloat16)
    put_in(monkeypatch, card((6, 1), 20_000), lambda index, budget: working(index, 20_000))
    monkeypatch.setattr("moe_offload.device_dtype.check_range", None)
    with moe_offload.load(bf16).offload as engine:
        assert engine.device is None and engine._model.dtype == torch.bfloat16
    assert len(warnings_in(caplog)) == 1 and "20.0 KB for them: raise gpu_memory" in warnings_in(caplog)[0]


def test_packed_linears_where_the_device_is_given_up_late(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _arrange("lost", monkeypatch)
    with moe_offload.load(folder, weights="int8", pack_dir=tmp_path).offload as engine:
        assert engine.device is None and engine.dense == "int8"


def test_an_error_of_ours_is_not_taken_for_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch, PASCAL)
    monkeypatch.setattr(f"{SIDE}.attach", _attach_raises(RuntimeError("shapes do not match")))
    with pytest.raises(moe_offload.CheckpointError, match="shapes do not match"):
        moe_offload.load(folder)


OPERATIONS = 120  # about as many as a load has


@settings(deadline=None, max_examples=12)
@given(st.integers(0, OPERATIONS), st.booleans(), st.sampled_from(["ours", "static", "lru"]))
def test_a_device_that_fails_at_any_operation(folder: Path, after: int, lost: bool, policy: str) -> None:
    """Of a load: it ends on the CPU, or the device lasted until it was through; then answers are the same, too."""
    made: list[VirtualAccelerator] = []

    def opened(index: int, nbytes: int | None) -> VirtualAccelerator:
        found = working(index, nbytes)
        made.append(found)
        if lost:
            found.fail_after(after)
        else:
            found.shrink_budget(0, after)
        return found

    with pytest.MonkeyPatch.context() as patch:
        put_in(patch, PASCAL, opened)
        with moe_offload.load(folder, gpu_memory=budget(folder, 8), policy=policy).offload as engine:
            if engine.device is None:
                _check_on_the_cpu(engine._model, folder)
            else:
                assert generate(engine._model, IDS) == expected(folder, IDS)
    assert len(made) == 1 and not made[0]._allocated and all(not arena.nbytes for arena in made[0]._arenas)


class _Card(VirtualAccelerator):
    """Its memory is torch's "meta", which modules can be moved to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.torch_device = torch.device("meta")


def test_modules_come_back_from_a_device_that_fails_behind_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moved: list[str] = []

    def attach(model: PreTrainedModel, *_: Any) -> None:
        moved.extend(name for name, each in model.named_parameters() if each.device.type == "meta")
        raise torch.OutOfMemoryError(TORCH_OOM)

    put_in(monkeypatch, PASCAL, _of(_Card))
    monkeypatch.setattr("moe_offload.device_side.device_attention.attach", attach)
    with moe_offload.load(folder).offload as engine:
        assert len(moved) > 20
        _check_on_the_cpu(engine._model, folder)
        assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("after", [0, 1, 7])
def test_modules_that_do_not_fit_are_not_moved_at_all(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("qwen3_moe", torch.float32)
    before = {name: each.data_ptr() for name, each in model.named_parameters()}
    left, move = [None] * after, device_modules._on

    def run_out(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not left:
            raise torch.OutOfMemoryError(TORCH_OOM)
        left.pop()
        return move(tensor, device)

    monkeypatch.setattr(device_modules, "_on", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        DeviceModules(model, torch.device("meta"))
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == before
    assert not model.get_input_embeddings()._forward_hooks


# Kernels


class _RealCard(VirtualAccelerator):
    simulated = False

    def __init__(self) -> None:
        super().__init__(working(0, None).profile)
        self.name, self.torch_device = "NVIDIA GeForce GTX 1080 Ti", torch.device("cuda", 1)


@pytest.fixture
def real_card(monkeypatch: pytest.MonkeyPatch) -> _RealCard:
    expert_kernels.say_without.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", {1: (6, 1)}.__getitem__)
    return _RealCard()


CUPY = {
    "none": (CupyFacts(capability=(6, 1)), ["CuPy is not installed", "pip install 'moe-offload[cuda12]'"]),
    "for another CUDA": (CupyFacts((("cupy-cuda13x", "14.2.0"),), capability=(6, 1)), ["cupy-cuda13x cannot compile"]),
    "too old": (CupyFacts((("cupy-cuda12x", "13.6.0"),), capability=(6, 1)), ["version 14 is needed", "pip install"]),
    "broken": (
        CupyFacts((("cupy-cuda12x", "14.2.0"),), (12,), "no libcudart", (6, 1)), ["no libcudart", "pip uninstall -y"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CUPY)
def test_without_cupy_torch_runs_the_experts_and_that_is_said_once(
    case: str, real_card: _RealCard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts, words = CUPY[case]
    asked: list[tuple[int, int]] = []

    def detect(capability: tuple[int, int], driver: tuple[int, ...] | None) -> CupyFacts:
        asked.append(capability)
        return facts

    monkeypatch.setattr(expert_kernels, "detect_cupy", detect)
    for _ in range(3):
        assert expert_kernels.expert_kernels(real_card) is None
    said = warnings_in(caplog)
    assert len(said) == 1 and asked == [(6, 1)] * 3
    assert all(word in said[0] for word in ["GTX 1080 Ti run by torch's operations", *words])


def test_kernels_that_cannot_be_made(
    real_card: _RealCard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expert_kernels, "cupy_problem", lambda facts: None)
    monkeypatch.setattr(
        "moe_offload.gpu_kernels.cupy_kernels.CupyKernels.__init__", _init_raises(KernelError("no NVRTC"))
    )
    assert expert_kernels.expert_kernels(real_card) is None
    assert len(warnings_in(caplog)) == 1 and "no NVRTC" in warnings_in(caplog)[0]


def test_kernels_are_for_the_card_of_the_accelerator(real_card: _RealCard, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_offload.gpu_kernels.cupy_kernels import CupyKernels

    made: list[int] = []
    monkeypatch.setattr(expert_kernels, "cupy_problem", lambda facts: None)
    monkeypatch.setattr(CupyKernels, "__init__", lambda self, index: made.append(index))
    assert isinstance(expert_kernels.expert_kernels(real_card), CupyKernels) and made == [1]


def test_a_simulated_device_has_none_and_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_kernels, "detect_cupy", None)
    with working(0, None) as accelerator:
        assert expert_kernels.expert_kernels(accelerator) is None


# The command line


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_model.make_folder(tmp_path_factory.mktemp("spoken") / "model", dtype=torch.bfloat16)


def _generate(folder: Path, *flags: str) -> int:
    return main(["generate", str(folder), "-p", "hello", "--greedy", "--max-new-tokens", "3", *flags])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "loaded in float16, which has the range"),
        (("--dtype", "bf16"), "slow or missing"),
        (("--dtype", "f32"), ""),
    ],
)
def test_the_command_line_says_it_once(
    flags: tuple[str, ...],
    words: str,
    spoken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_in(monkeypatch, card((7, 0)))
    assert _generate(spoken, *flags) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == bool(words) and all(words in note and "V100" in note for note in notes)


def test_the_command_line_goes_on_or_ends(
    spoken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in(monkeypatch, card((7, 0)), _no_context)
    assert _generate(spoken) == 0
    err = capsys.readouterr().err
    assert err.count("note:") == 1 and "is out of memory" in err and "the model runs on the CPU" in err
    assert _generate(spoken, "--device", "cuda") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error:") and "lower gpu_memory (--gpu-memory)" in err
