"""Judgement of `moe-offload doctor` on main memory: who takes it, who limits it, and how it is mapped."""

from moe_offload.doctor_findings import Finding, Severity
from moe_offload.doctor_memory_facts import MemoryFacts
from moe_offload.memory import format_bytes

_SMALL = 0.5  # of what there is: less is worth a word
_SWAPPED = 0.05  # of memory
_RESERVED = 0.05
_LITTLE = 8 << 30  # of lockable memory; less than any model's experts
_LARGEST_DEMO = 1 << 30  # less than that, and nothing but toys runs


def memory_findings(memory: MemoryFacts, cards: bool) -> list[Finding]:
    """`cards`: a card can be used, for which memory is page-locked."""
    found = (_limit(memory), _available(memory), _swap(memory), _huge_pages(memory), _reserved(memory))
    locked = _locked(memory) if cards else None
    return [each for each in (*found, locked) if each is not None]


def _limit(memory: MemoryFacts) -> Finding | None:
    if memory.limited_by is None or memory.total >= memory.machine:
        return None
    text = (
        f"this process may take {format_bytes(memory.total)} of the machine's {format_bytes(memory.machine)}, by the "
        f"limit in {memory.limited_by}; pages of mapped weights count, too"
    )
    help_ = "raise it where the container or the job is started (docker run --memory, systemd MemoryMax, Slurm --mem)"
    severity: Severity = "advice" if memory.total < _SMALL * memory.machine else "note"
    return Finding(severity, text, instruction=help_, section="memory")


def _available(memory: MemoryFacts) -> Finding | None:
    if memory.available >= _SMALL * memory.total and memory.available >= _LARGEST_DEMO:
        return None
    text = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} of memory are free"
    return Finding("advice", text, command="ps -eo rss,pid,args --sort=-rss | head", section="memory")


def _swap(memory: MemoryFacts) -> Finding | None:
    if memory.swap_used <= _SWAPPED * memory.machine:
        return None
    text = f"{format_bytes(memory.swap_used)} are swapped out: memory is, or was, short, and what comes back is slow"
    help_ = "stop other programs; weights are mapped files and need no swap"
    return Finding("advice", text, instruction=help_, section="memory")


def _huge_pages(memory: MemoryFacts) -> Finding | None:
    if memory.huge_pages != "never":
        return None
    text = "transparent huge pages are off: every 4 KB of weights costs a look-up of its own"
    command = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    return Finding("advice", text, command=command, section="memory")


def _reserved(memory: MemoryFacts) -> Finding | None:
    if memory.reserved <= _RESERVED * memory.machine:
        return None
    text = f"{format_bytes(memory.reserved)} are set aside as huge pages that nobody uses, and no model can take them"
    return Finding("advice", text, command="sudo sysctl vm.nr_hugepages=0", section="memory")


def _locked(memory: MemoryFacts) -> Finding | None:
    """A note: NVIDIA's driver pins pages itself, and most systems do not hold it to this limit."""
    if memory.lock_limit is None or memory.lock_limit >= min(_LITTLE, memory.total):
        return None
    text = (
        f"a process may lock {format_bytes(memory.lock_limit)} (ulimit -l); NVIDIA's driver mostly does not ask, but "
        "where loading says that memory cannot be page-locked, this is why"
    )
    help_ = "raise it with ulimit -l unlimited as root, docker run --ulimit memlock=-1, or in /etc/security/limits.conf"
    return Finding("note", text, instruction=help_, section="memory")
