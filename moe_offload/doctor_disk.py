"""Judgement of `moe-offload doctor` on the disks where models and converted weights lie."""

from moe_offload.doctor_disk_facts import MODELS, PACKS, DiskFacts
from moe_offload.doctor_findings import Finding
from moe_offload.memory import format_bytes

_SLOW = 300e6  # bytes a second: a model of 30 GB takes more than a minute and a half
_LITTLE = 20_000_000_000  # free: the least that a model worth the name takes
_MOVE = {
    MODELS: "set HF_HOME to a folder on it",
    PACKS: "give --pack-dir a folder on it",
}


def disk_findings(disks: tuple[DiskFacts, ...]) -> list[Finding]:
    """What is wrong with any of them."""
    found = []
    for disk in disks:
        found += [_kind(disk) or _rate(disk), _space(disk), _writable(disk), _unmeasured(disk)]
    return [each for each in found if each is not None]


def move(disk: DiskFacts, where: str) -> str:
    """How to have these folders elsewhere."""
    return f"if there is {where}, {' and '.join(_MOVE[holds] for holds, _ in disk.folders if holds in _MOVE)}"


def _names(disk: DiskFacts) -> str:
    return " and ".join(holds for holds, _ in disk.folders)


def _kind(disk: DiskFacts) -> Finding | None:
    rate = "" if disk.read_rate is None else f", at {format_bytes(disk.read_rate)}/s"
    if disk.network:
        text = (
            f"{_names(disk)} come over the network ({disk.filesystem}, {disk.source}){rate}: models larger than memory "
            "are read from there at every token"
        )
        return Finding("advice", text, instruction=move(disk, "a local disk with room"), section="disk")
    if disk.in_memory:
        text = f"{_names(disk)} lie in memory ({disk.filesystem}): they take what models need, and a restart loses them"
        return Finding("advice", text, instruction=move(disk, "a disk with room"), section="disk")
    if disk.overlay and _rate(disk) is None:
        text = f"{_names(disk)} lie in the container's own layer ({disk.filesystem}) and are gone with it"
        return Finding("note", text, instruction=move(disk, "a volume that stays"), section="disk")
    return None


def _rate(disk: DiskFacts) -> Finding | None:
    slow = disk.read_rate is not None and disk.read_rate < _SLOW
    if disk.read_rate is None and disk.rotates:
        text = f"{_names(disk)} lie on a hard disk"
    elif disk.read_rate is not None and slow:
        minutes = 30e9 / max(disk.read_rate, 1.0) / 60
        kind = "hard disk" if disk.rotates else "disk"
        text = (
            f"the {kind} with {_names(disk)} reads {format_bytes(disk.read_rate)}/s: 30 GB take {minutes:.0f} minutes, "
            "and a model larger than memory is read again at every token"
        )
    else:
        return None
    return Finding("advice", text, instruction=move(disk, "a faster disk"), section="disk")


def _space(disk: DiskFacts) -> Finding | None:
    if disk.free is None or disk.free >= _LITTLE or disk.in_memory:
        return None
    text = f"{format_bytes(disk.free)} are free where {_names(disk)} lie: most models need more, converted ones too"
    help_ = f"remove models that you do not need any more; {move(disk, 'a larger disk')}"
    return Finding("advice", text, instruction=help_, section="disk")


def _writable(disk: DiskFacts) -> Finding | None:
    if disk.writable:
        return None
    folders = " or ".join(folder for _, folder in disk.folders)
    text = f"{folders} cannot be written to: nothing can be downloaded or converted there"
    return Finding("advice", text, instruction=move(disk, "a folder of yours"), section="disk")


def _unmeasured(disk: DiskFacts) -> Finding | None:
    if disk.read_error is None or not disk.writable:
        return None
    return Finding("note", f"the disk with {_names(disk)} could not be measured: {disk.read_error}", section="disk")
