"""CPU, memory, disks and software of `moe-offload doctor` for human eyes."""

from rich.table import Table
from rich.text import Text

from moe_offload.doctor_cpu import better_tier
from moe_offload.doctor_cpu_facts import CpuFacts
from moe_offload.doctor_disk_facts import DiskFacts
from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_memory_facts import MemoryFacts
from moe_offload.doctor_modules import MemoryModules
from moe_offload.memory import format_bytes


def facts_table() -> Table:
    """Names and values, readable in 80 columns."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    return table


def cpu_table(cpu: CpuFacts, modules: MemoryModules | None) -> Table:
    table = facts_table()
    table.add_row("name", Text(cpu.name or "unknown"))
    table.add_row("cores", _cores(cpu))
    table.add_row("instructions", cpu.tier)
    better = better_tier(cpu.tier)
    if better is not None:
        table.add_row("newer ones", better)
    if cpu.governor is not None:
        driver = f" ({cpu.clock_driver})" if cpu.clock_driver else ""
        table.add_row("clock", Text(f"governor {cpu.governor}{driver}"))
    if len(cpu.nodes) == 1:
        table.add_row("NUMA", "1 node")
    for node in cpu.nodes if len(cpu.nodes) > 1 else ():
        size = "memory unknown" if node.memory_bytes is None else format_bytes(node.memory_bytes)
        table.add_row(f"NUMA node {node.number}", f"{size}, {node.cpus} of the usable hardware threads")
    if cpu.read_rate is not None:
        speed = cpu.read_rate / 1e9
        table.add_row("memory reads", f"{speed:.1f} GB/s, measured with {_count(cpu.cores, 'thread')}: at most")
        table.add_row("", f"{speed:.0f} tokens/s on the CPU where a token needs 1 GB of weights")
    if modules is not None and modules.rate is not None:
        kind = f"{_count(modules.channels or 0, 'channel')} of {modules.kind}-{modules.speed}"
        table.add_row("", f"its modules give {modules.rate / 1e9:.1f} GB/s ({kind})")
    return table


def memory_table(memory: MemoryFacts) -> Table:
    table = facts_table()
    table.add_row("in all", f"{format_bytes(memory.total)}, {format_bytes(memory.available)} free")
    if memory.limited_by is not None:
        table.add_row("limited by", Text(f"{memory.limited_by}; the machine has {format_bytes(memory.machine)}"))
    modules = memory.modules
    if modules is not None:
        slots = f"{modules.count} of {modules.slots} slots"
        table.add_row("modules", f"{modules.kind}-{modules.speed} in {slots}")
    swap = f"{format_bytes(memory.swap)}, {format_bytes(memory.swap_used)} in use" if memory.swap else "none"
    table.add_row("swap", swap)
    if memory.huge_pages is not None:
        asked = {"always": "always", "madvise": "where programs ask, as this one does", "never": "never"}
        table.add_row("huge pages", asked.get(memory.huge_pages, memory.huge_pages))
    if memory.reserved:
        table.add_row("", f"{format_bytes(memory.reserved)} set aside and unused")
    table.add_row("lockable", "no limit" if memory.lock_limit is None else format_bytes(memory.lock_limit))
    return table


def disk_table(disks: tuple[DiskFacts, ...]) -> Table:
    table = facts_table()
    for disk in disks:
        for holds, folder in disk.folders:
            table.add_row(holds, Text(folder))
        kind = " on ".join(part for part in (disk.filesystem, disk.source) if part) or "unknown"
        room = ""
        if disk.total is not None and disk.free is not None:
            room = f", {format_bytes(disk.total)}, {format_bytes(disk.free)} free"
        table.add_row("disk", Text(f"{kind}{', over the network' if disk.network else ''}{room}"))
        if disk.read_rate is not None:
            table.add_row("disk reads", f"{format_bytes(disk.read_rate)}/s, measured")
    return table


def software_table(facts: MachineFacts) -> Table:
    software, cuda = facts.software, facts.cuda
    table = facts_table()
    table.add_row("moe-offload", f"{facts.version}, Python {facts.python}")
    table.add_row("transformers", facts.transformers or "not installed")
    built = "without CUDA" if cuda.cuda is None else f"with CUDA {cuda.cuda}"
    code = f" for {' '.join(cuda.architectures)}" if cuda.architectures else ""
    threads = "" if software.torch_threads is None else f", {_count(software.torch_threads, 'thread')}"
    table.add_row("torch", Text(f"{cuda.torch}, built {built}{code}{threads}"))
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in software.packages)
    if packages:
        table.add_row("others", Text(packages))
    if software.kernels is not None:
        table.add_row("kernels in", Text(software.kernels))
    for name, value in software.environment:
        table.add_row("environment", Text(f"{name}={value}"))
    return table


def _cores(cpu: CpuFacts) -> str:
    text = f"{cpu.cores} used"
    if cpu.allowed_cores > cpu.cores:
        text += f" of {cpu.allowed_cores}"
    if cpu.quota is not None:
        text += f" (quota of {cpu.quota:.3g} CPUs)"
    if cpu.allowed > cpu.allowed_cores:
        text += f", one of {cpu.allowed // max(cpu.allowed_cores, 1)} hardware threads each"
    if cpu.allowed < cpu.present:
        text += f", {cpu.allowed} of {cpu.present} hardware threads allowed"
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
