"""What memory modules are built in, by the firmware's table (SMBIOS, for root only) and the error counters' (EDAC).

Their rate is told only where both speak and mean the same: DDR3 and DDR4 on a server whose controllers are known. What
a channel is to EDAC differs for DDR5.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_offload.doctor_files import read_line, read_number

_KINDS = {0x18: "DDR3", 0x1A: "DDR4", 0x22: "DDR5"}
_KNOWN_CHANNELS = ("DDR3", "DDR4")
_CHANNEL_BYTES = 8
_EMPTY, _UNKNOWN = 0, 0xFFFF
_LEAST = 0x22  # bytes of an entry that tells the speed it runs at


@dataclass(frozen=True, slots=True)
class MemoryModules:
    """`speed`: million transfers a second of the slowest one. `channels`: with a module, None where nobody knows."""

    kind: str
    count: int
    slots: int
    speed: int
    channels: int | None = None

    @property
    def rate(self) -> float | None:
        """Bytes a second that all channels give together; None where nobody knows."""
        if self.channels is None or self.kind not in _KNOWN_CHANNELS:
            return None
        return self.channels * _CHANNEL_BYTES * self.speed * 1e6


def detect_modules(root: Path = Path("/")) -> MemoryModules | None:
    """None where the firmware's table cannot be read, or tells nothing of use. Never raises."""
    slots, kinds, speeds = 0, set[str](), list[int]()
    for entry in sorted((root / "sys/firmware/dmi/entries").glob("17-*")):
        try:
            raw = (entry / "raw").read_bytes()
        except OSError:
            return None
        if len(raw) < _LEAST or raw[0] != 17 or raw[1] < _LEAST:
            return None
        slots += 1
        if int.from_bytes(raw[0x0C:0x0E], "little") == _EMPTY:
            continue
        speed = int.from_bytes(raw[0x20:0x22], "little")
        if raw[0x12] not in _KINDS or speed in (_EMPTY, _UNKNOWN):
            return None
        kinds.add(_KINDS[raw[0x12]])
        speeds.append(speed)
    if len(kinds) != 1:
        return None
    return MemoryModules(kinds.pop(), len(speeds), slots, min(speeds), _channels(root, len(speeds)))


def _channels(root: Path, modules: int) -> int | None:
    """Where the controllers list as many modules as the firmware does."""
    places = []
    for module in (root / "sys/devices/system/edac/mc").glob("mc[0-9]*/dimm[0-9]*"):
        words = (read_line(module / "dimm_location") or "").split()
        if not read_number(module / "size"):
            continue
        if "channel" not in words[:-1]:
            return None
        places.append((module.parent.name, words[words.index("channel") + 1]))
    return len(set(places)) if places and len(places) == modules else None
