"""What is read about cards: from a stand-in for NVML, from files as kernel and driver write them, from torch."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.transfer.accelerator import HostArena, OutOfDeviceMemoryError
from moe_offload.transfer.card_facts import CardFacts, DriverFacts, Link, detect_cards, match_cards, measure_copy
from moe_offload.transfer.card_probes import ask_nvml, parse_version, plain_bus, read_driver, system_link
from moe_offload.transfer.find_device import Card, CudaFacts
from moe_offload.transfer.server_profile import find_profile
from moe_offload.transfer.virtual import VirtualAccelerator

GIB = 1 << 30
NO_CUDA = CudaFacts("2.13.0+cpu", None)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@build)  Sun Jul 27"
CLOSED = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version:  gcc 12"
)


class FakeNvml(ModuleType):
    """pynvml with two cards. `silent`: functions that fail, as on cards and drivers that do not support them."""

    def __init__(self, *silent: str) -> None:
        super().__init__("pynvml")
        self.silent, self.log = silent, list[str]()
        self.cards = [
            ("NVIDIA GeForce GTX 1080 Ti", "GPU-AAAA-1", "00000000:65:00.0", (6, 1), 11 * GIB, (1, 8, 3, 16)),
            ("Tesla T4", b"GPU-bbbb-2", b"00000000:B3:00.0", (7, 5), 15 * GIB, (3, 16, 3, 16)),
        ]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(handle: int | None = None) -> Any:
            self.log.append(name)
            if name in self.silent:
                raise RuntimeError(f"{name}: Not Supported")
            return self.answer(name, handle)

        return call

    def answer(self, name: str, handle: int | None) -> Any:
        machine = {
            "nvmlInit": None, "nvmlShutdown": None, "nvmlSystemGetDriverVersion": b"535.183.01",
            "nvmlSystemGetCudaDriverVersion_v2": 12020, "nvmlDeviceGetCount": len(self.cards),
            "nvmlDeviceGetHandleByIndex": handle,
        }  # fmt: skip
        if name in machine:
            return machine[name]
        assert handle is not None
        card, uuid, bus, capability, total, link = self.cards[handle]
        names = "CurrPcieLinkGeneration", "CurrPcieLinkWidth", "MaxPcieLinkGeneration", "MaxPcieLinkWidth"
        links = dict(zip(names, link, strict=True))
        return {
            "Name": card, "UUID": uuid, "PciInfo": SimpleNamespace(busId=bus), "CudaComputeCapability": capability,
            "MemoryInfo": SimpleNamespace(total=total, free=total - GIB), **links,
        }[name.removeprefix("nvmlDeviceGet")]  # fmt: skip


def fake(monkeypatch: pytest.MonkeyPatch, *silent: str) -> FakeNvml:
    nvml = FakeNvml(*silent)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


@pytest.fixture
def without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def device(root: Path, bus: str, port: str = "0000:00:01.0", **files: str) -> Path:
    """A card behind a port, as /sys has them: the bus' folder holds links."""
    folder = root / "sys/devices/pci0000:00" / port / bus
    for name, text in {"vendor": "0x10de", "class": "0x030000", **files}.items():
        write(folder / name, text)
    link = root / "sys/bus/pci/devices" / bus
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder)
    return folder


def identities(monkeypatch: pytest.MonkeyPatch, *cards: dict[str, Any]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**cards[index]))


def test_what_nvml_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = fake(monkeypatch)
    device(tmp_path, "0000:65:00.0", numa_node="1")
    device(tmp_path, "0000:b3:00.0", numa_node="-1")
    driver, cards = detect_cards(NO_CUDA, tmp_path)
    assert driver == DriverFacts((535, 183, 1), (12, 2), nvml=True, on_bus=("0000:65:00.0", "0000:b3:00.0"))
    assert cards == (
        CardFacts(
            "NVIDIA GeForce GTX 1080 Ti", None, (6, 1), 11 * GIB, 10 * GIB, "aaaa-1", "0000:65:00.0",
            Link(1, 8, 3, 16), 1,
        ),
        CardFacts("Tesla T4", None, (7, 5), 15 * GIB, 14 * GIB, "bbbb-2", "0000:b3:00.0", Link(3, 16, 3, 16), None),
    )  # fmt: skip
    assert nvml.log[0] == "nvmlInit" and nvml.log[-1] == "nvmlShutdown"


EVERYTHING = [
    "nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion_v2", "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetPciInfo",
    "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetCurrPcieLinkGeneration",
    "nvmlDeviceGetCurrPcieLinkWidth", "nvmlDeviceGetMaxPcieLinkGeneration", "nvmlDeviceGetMaxPcieLinkWidth",
    "nvmlShutdown",
]  # fmt: skip


@pytest.mark.parametrize("name", EVERYTHING)
def test_any_probe_may_fail(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, name)
    driver, cards = detect_cards(NO_CUDA, tmp_path)
    assert driver.nvml and driver.nvml_error is None
    assert len(cards) == (0 if name in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex") else 2)
    if name == "nvmlDeviceGetPciInfo":
        assert cards[0].bus is None and cards[0].uuid == "aaaa-1"
    if name == "nvmlDeviceGetMemoryInfo":
        assert cards[0].memory_bytes is None and cards[0].free_bytes is None and cards[0].link == Link(1, 8, 3, 16)


def test_nvml_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, "nvmlInit")
    driver, cards = detect_cards(NO_CUDA, tmp_path)
    assert driver.nvml and driver.nvml_error == "nvmlInit: Not Supported" and cards == ()


@pytest.mark.usefixtures("without_nvml")
def test_the_drivers_own_list_where_nvml_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "proc/driver/nvidia/version", CLOSED)
    text = (
        "Model: \t\t NVIDIA GeForce GTX 1080 Ti\nIRQ:   \t\t 42\nGPU UUID: \t GPU-Aaaa-1\nBus Location: \t 0000:65:00.0"
    )
    write(tmp_path / "proc/driver/nvidia/gpus/0000:65:00.0/information", text)
    write(tmp_path / "dev/nvidiactl", "")
    device(
        tmp_path, "0000:65:00.0", max_link_speed="8.0 GT/s PCIe", max_link_width="16", numa_node="0",
        current_link_speed="2.5 GT/s PCIe", current_link_width="16",
    )  # fmt: skip
    driver, cards = detect_cards(NO_CUDA, tmp_path)
    assert driver == DriverFacts((535, 183, 1), device_nodes=True, on_bus=("0000:65:00.0",))
    assert cards == (
        CardFacts(
            "NVIDIA GeForce GTX 1080 Ti", uuid="aaaa-1", bus="0000:65:00.0", link=Link(1, 16, 3, 16), numa_node=0
        ),
    )  # fmt: skip


@pytest.mark.usefixtures("without_nvml")
def test_a_card_without_its_driver(tmp_path: Path) -> None:
    device(tmp_path, "0000:65:00.0")
    device(tmp_path, "0000:65:00.1", **{"class": "0x040300"})  # its sound
    device(tmp_path, "0000:02:00.0", vendor="0x8086")
    driver, cards = detect_cards(NO_CUDA, tmp_path)
    assert driver == DriverFacts(on_bus=("0000:65:00.0",)) and cards == ()


@pytest.mark.parametrize(
    ("text", "version", "opened"),
    [(OPEN, (580, 65, 6), True), (CLOSED, (535, 183, 1), False), ("NVRM version: ?", None, False), ("", None, False)],
)
def test_the_kernel_module(text: str, version: tuple[int, ...] | None, opened: bool, tmp_path: Path) -> None:
    write(tmp_path / "proc/driver/nvidia/version", text)
    facts = read_driver(tmp_path)
    assert (facts.version, facts.open_module) == (version, opened)


def test_the_slower_end_of_a_link_counts(tmp_path: Path) -> None:
    card = device(tmp_path, "0000:65:00.0", max_link_speed="16.0 GT/s PCIe", max_link_width="16")
    write(card.parent / "max_link_speed", "8.0 GT/s PCIe")
    write(card.parent / "max_link_width", "4")
    assert system_link("0000:65:00.0", tmp_path) == Link(None, None, 3, 4)
    for name, text in (("max_link_speed", "Unknown"), ("max_link_width", "255")):
        write(card / name, text)
        write(card.parent / name, text)
    assert system_link("0000:65:00.0", tmp_path) == system_link("0000:99:00.0", tmp_path) == Link()


@pytest.mark.parametrize(
    ("link", "rate"),
    [
        (Link(1, 16, 3, 16), 15.76e9),  # idle: what it does under load counts
        (Link(1, 4, 3, 16), 3.94e9),  # but lanes that are not connected do not come back
        (Link(4, None, None, 8), 15.75e9),
        (Link(5, 16), 63.0e9),
        (Link(), None),
        (Link(9, 16, 9, 16), None),
        (Link(3, 0, 3, 0), None),
    ],
)
def test_what_a_link_carries(link: Link, rate: float | None) -> None:
    assert link.rate == (None if rate is None else pytest.approx(rate, rel=0.01))


PASCAL, TURING = Card("NVIDIA GeForce GTX 1080 Ti", (6, 1), 11 * GIB), Card("Tesla T4", (7, 5), 15 * GIB)
BUILT = CudaFacts("2.13.0", "12.6", ("sm_60", "sm_70", "sm_75"), (TURING, PASCAL))


def test_cards_in_another_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA has the faster card first, NVML the one with the lower bus number."""
    fake(monkeypatch)
    identities(
        monkeypatch,
        {"uuid": "BBBB-2"},  # by UUID
        {"pci_domain_id": 0, "pci_bus_id": 0x65, "pci_device_id": 0},  # by its place
    )
    _, cards = detect_cards(BUILT, tmp_path)
    assert [(card.index, card.name, card.link.width) for card in cards] == [(0, TURING.name, 16), (1, PASCAL.name, 8)]


def test_a_hidden_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch)
    identities(monkeypatch, {"uuid": "bbbb-2"})
    _, cards = detect_cards(CudaFacts("2.13.0", "12.6", ("sm_75",), (TURING,)), tmp_path)
    assert [(card.index, card.name) for card in cards] == [(0, TURING.name), (None, PASCAL.name)]


def test_names_only_where_they_are_unique() -> None:
    known = [CardFacts("Tesla T4", uuid="a"), CardFacts("Tesla T4", uuid="b"), CardFacts(PASCAL.name, uuid="c")]
    cards = match_cards([TURING, PASCAL], [(None, None), (None, None)], known)
    assert [card.uuid for card in cards] == [None, "c", "a", "b"]
    assert match_cards([TURING], [("z", None)], known)[0].uuid == "z"  # one that NVML does not know


@pytest.mark.usefixtures("without_nvml")
def test_torch_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    identities(monkeypatch, {}, {"pci_domain_id": 0, "pci_bus_id": 0x65, "pci_device_id": 0})
    device(tmp_path, "0000:65:00.0", numa_node="1", max_link_speed="8.0 GT/s PCIe", max_link_width="16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (9 * GIB, 11 * GIB))
    driver, cards = detect_cards(BUILT, tmp_path)
    assert not driver.nvml
    assert cards == (
        CardFacts(TURING.name, 0, (7, 5), 15 * GIB, 9 * GIB),
        CardFacts(PASCAL.name, 1, (6, 1), 11 * GIB, 9 * GIB, None, "0000:65:00.0", Link(None, None, 3, 16), 1),
    )


def test_torch_that_breaks_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(index: int) -> None:
        raise RuntimeError("CUDA error: unknown error")

    fake(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    _, cards = detect_cards(BUILT, tmp_path)
    assert [(card.index, card.uuid) for card in cards] == [(0, "bbbb-2"), (1, "aaaa-1")]  # by their names


maybe = st.none() | st.sampled_from("abc")
torch_cards = st.lists(st.tuples(st.sampled_from([PASCAL, TURING]), st.tuples(maybe, maybe)), max_size=4)
known_cards = st.lists(
    st.builds(CardFacts, st.sampled_from([PASCAL.name, TURING.name]), uuid=maybe, bus=maybe), max_size=4
)


@given(torch_cards, known_cards)
@settings(deadline=None, max_examples=200)
def test_no_card_is_lost_or_counted_twice(seen: list[tuple[Card, Any]], known: list[CardFacts]) -> None:
    cards = match_cards([card for card, _ in seen], [names for _, names in seen], known)
    indices = [card.index for card in cards]
    assert indices == [*range(len(seen)), *[None] * (len(cards) - len(seen))]
    assert max(len(seen), len(known)) <= len(cards) <= len(seen) + len(known)
    for card, (of_torch, _) in zip(cards, seen, strict=False):
        assert (card.name, card.capability) == (of_torch.name, of_torch.capability)


def test_spellings() -> None:
    assert parse_version(" 535.183.01\n") == (535, 183, 1)
    assert parse_version("535.x") is parse_version("") is None
    assert plain_bus("00000000:B3:00.0") == plain_bus("0000:b3:00.0") == "0000:b3:00.0"


def test_a_damaged_nvml_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))  # another package of that name
    driver, cards = ask_nvml(DriverFacts())
    assert driver.nvml and "nvmlInit" in str(driver.nvml_error) and cards == []


@pytest.mark.parametrize("profile", ["gtx1080ti", "t4"])
def test_a_measured_copy(profile: str) -> None:
    accelerator = VirtualAccelerator(find_profile(profile))
    rate = measure_copy(accelerator, 8 << 20)
    assert rate == pytest.approx(accelerator.profile.link_gbs * 1e9, rel=0.1)
    assert accelerator.used == 0 and accelerator.peak == 8 << 20
    accelerator.close()


def test_a_card_that_is_full_gets_its_page_locked_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, log = VirtualAccelerator(find_profile("gtx1080ti"), 1 << 20), list[str]()

    def arena(nbytes: int) -> HostArena:
        made = VirtualAccelerator.host_arena(accelerator, nbytes)
        close = made.close

        def noted() -> None:
            log.append("closed")
            close()

        monkeypatch.setattr(made, "close", noted)
        return made

    monkeypatch.setattr(accelerator, "host_arena", arena)
    with pytest.raises(OutOfDeviceMemoryError):
        measure_copy(accelerator, 8 << 20)
    assert log == ["closed"]
