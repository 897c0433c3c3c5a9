"""The driver and its cards as NVML and the system's files tell them. Nothing here raises.

Without NVML's package the files still say that there is a driver and a card, or a card without a driver, which is what
somebody without a working GPU needs to hear.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor, and the class of display and compute devices
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # by gigatransfers a second
_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # bytes a second, less the line code
_VERSION = re.compile(r"\s(\d{3,}(?:\.\d+){1,2})\s")
_DEVICES = "sys/bus/pci/devices"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Link:
    """The PCIe link of a card. An idle card lowers its generation: `generation` is that of this moment, `most_` what
    card and slot can do together.
    """

    generation: int | None = None
    width: int | None = None
    most_generation: int | None = None
    most_width: int | None = None

    @property
    def rate(self) -> float | None:
        """Bytes a second that the lanes carry, without any overhead of transfers; None where nobody says."""
        lane = _LANE.get(self.most_generation or self.generation or 0)
        width = self.width or self.most_width
        return None if lane is None or not width else lane * width


@dataclass(frozen=True, slots=True)
class CardFacts:
    """A card. `index`: torch's number, None where torch does not see it. `bus`: its place, such as 0000:65:00.0.
    `copy_rate`: bytes a second of a measured copy to it, `copy_error` why there is none.
    """

    name: str
    index: int | None = None
    capability: tuple[int, int] | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    uuid: str | None = None
    bus: str | None = None
    link: Link = Link()
    numa_node: int | None = None
    copy_rate: float | None = None
    copy_error: str | None = None


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """NVIDIA's driver. `cuda`: the newest CUDA that it runs. `open_module`: its kernel module is the open one, which
    drives no card before Turing. `device_nodes`: /dev has its devices. `nvml`: whether NVML's package is there,
    `nvml_error` why it says nothing. `on_bus`: places of NVIDIA's display devices, whoever drives them.
    """

    version: tuple[int, ...] | None = None
    cuda: tuple[int, int] | None = None
    open_module: bool = False
    device_nodes: bool = False
    nvml: bool = False
    nvml_error: str | None = None
    on_bus: tuple[str, ...] = ()


def ask_nvml(driver: DriverFacts) -> tuple[DriverFacts, list[CardFacts]]:
    try:
        nvml: Any = import_module("pynvml")  # of the package nvidia-ml-py
    except Exception:
        return driver, []
    try:
        nvml.nvmlInit()
    except Exception as error:
        return replace(driver, nvml=True, nvml_error=str(error) or type(error).__name__), []
    try:
        version = tried(lambda: parse_version(_text(nvml.nvmlSystemGetDriverVersion())))
        cuda = tried(lambda: int(nvml.nvmlSystemGetCudaDriverVersion_v2()))
        cards = [_nvml_card(nvml, index) for index in range(tried(lambda: int(nvml.nvmlDeviceGetCount())) or 0)]
    finally:
        tried(nvml.nvmlShutdown)
    return replace(
        driver,
        nvml=True,
        version=version or driver.version,
        cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
    ), [card for card in cards if card is not None]


def _nvml_card(nvml: Any, index: int) -> CardFacts | None:
    handle = tried(lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    if handle is None:  # fallen off the bus
        return None
    memory: Any = tried(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    capability = tried(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    return CardFacts(
        tried(lambda: _text(nvml.nvmlDeviceGetName(handle))) or "NVIDIA card",
        None,
        None if capability is None else (int(capability[0]), int(capability[1])),
        tried(lambda: int(memory.total)),
        tried(lambda: int(memory.free)),
        tried(lambda: plain_uuid(_text(nvml.nvmlDeviceGetUUID(handle)))),
        tried(lambda: plain_bus(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))),
        Link(
            tried(lambda: int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle))),
            tried(lambda: int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle))),
            tried(lambda: int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))),
            tried(lambda: int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))),
        ),
    )


def read_driver(root: Path) -> DriverFacts:
    text = _read(root / "proc/driver/nvidia/version") or ""
    line = next((line for line in text.splitlines() if "NVRM" in line), "")
    match = _VERSION.search(f"{line} ")
    on_bus = []
    for device in sorted((root / _DEVICES).glob("*")):
        if _read(device / "vendor") == _NVIDIA and (_read(device / "class") or "").startswith(_DISPLAY):
            on_bus.append(device.name)
    return DriverFacts(
        parse_version(match[1]) if match else None,
        open_module="Open Kernel Module" in line,
        device_nodes=(root / "dev/nvidiactl").exists() or (root / "dev/dxg").exists(),  # dxg: WSL's
        on_bus=tuple(on_bus),
    )


def listed_cards(root: Path) -> list[CardFacts]:
    """The driver's own list, for where NVML is missing: names and places."""
    cards = []
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        fields = dict(re.findall(r"^([\w ]+):\s+(.*?)\s*$", _read(folder / "information") or "", re.MULTILINE))
        uuid = fields.get("GPU UUID", "")
        cards.append(
            CardFacts(
                fields.get("Model", "NVIDIA card"),
                uuid=None if not uuid or "?" in uuid else plain_uuid(uuid),
                bus=plain_bus(folder.name),
            )
        )
    return cards


def numa_node(bus: str, root: Path = Path("/")) -> int | None:
    """None where the system does not know it."""
    node = tried(lambda: int(_read(root / _DEVICES / bus / "numa_node") or ""))
    return None if node == -1 else node


def system_link(bus: str, root: Path = Path("/")) -> Link:
    """By the system's files: the most is that of the card or of the port above it, whichever can do less."""
    device = tried(lambda: (root / _DEVICES / bus).resolve()) or Path("/")

    def generation(folder: Path, name: str) -> int | None:
        match = re.match(r"([\d.]+) GT/s", _read(folder / name) or "")
        return _GENERATIONS.get(f"{float(match[1]):.1f}") if match else None

    def width(folder: Path, name: str) -> int | None:
        count = tried(lambda: int(_read(folder / name) or ""))
        return count if count and count < 64 else None  # 255: not known

    generations = [generation(each, "max_link_speed") for each in (device, device.parent)]
    widths = [width(each, "max_link_width") for each in (device, device.parent)]
    return Link(
        generation(device, "current_link_speed"),
        width(device, "current_link_width"),
        min((each for each in generations if each is not None), default=None),
        min((each for each in widths if each is not None), default=None),
    )


def parse_version(text: str) -> tuple[int, ...] | None:
    """'535.183.01' -> (535, 183, 1)."""
    parts = text.strip().split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else None


def plain_bus(text: str) -> str:
    """NVML's '00000000:65:00.0' as the system's files write it, '0000:65:00.0'."""
    domain, colon, rest = text.strip().lower().partition(":")
    return f"{domain[-4:]}{colon}{rest}"


def plain_uuid(text: str) -> str:
    return text.strip().lower().removeprefix("gpu-")


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def tried(probe: Callable[[], _T]) -> _T | None:
    try:
        return probe()
    except Exception:
        return None
