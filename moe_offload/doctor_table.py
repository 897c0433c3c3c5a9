"""`moe-offload doctor` for human eyes."""

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload.doctor import Verdict
from moe_offload.doctor_cards import numeric_paths, spoken
from moe_offload.doctor_facts import MachineFacts
from moe_offload.doctor_findings import dotted, is_supported, label
from moe_offload.doctor_host_table import cpu_table, disk_table, facts_table, memory_table, software_table
from moe_offload.memory import format_bytes
from moe_offload.transfer.card_facts import CardFacts, Link

_COLOURS = {"problem": "bold red", "advice": "bold yellow", "note": "bold"}


def print_verdict(facts: MachineFacts, verdict: Verdict) -> None:
    """Facts, conclusion, findings on stdout. Commands stand on lines of their own, never wrapped: to be copied."""
    console = Console(highlight=False)
    sections: dict[str, tuple[Table, ...]] = {
        "CPU": (cpu_table(facts.cpu, facts.memory.modules),),
        "memory": (memory_table(facts.memory),),
        "disk": (disk_table(facts.disks),),
        "GPU": (_gpu(facts), *(_card(card, verdict) for card in facts.cards)),
        "software": (software_table(facts),),
    }
    for section, tables in sections.items():
        console.print(_heading(section, verdict))
        for table in tables:
            console.print(Group(table, Text()))
    console.print(Text.assemble(("verdict: ", "bold"), _conclusion(facts, verdict)))
    for finding in verdict.findings:
        console.print(Text.assemble("\n", (f"{finding.severity}: ", _COLOURS[finding.severity]), finding.text))
        if finding.command is not None:
            console.print(Text(f"    {finding.command}", style="cyan"), soft_wrap=True)
        elif finding.instruction is not None:
            console.print(Text(f"What to do: {finding.instruction}."))
    if any(finding.severity == "problem" for finding in verdict.findings):
        console.print(Text("\nThen run moe-offload doctor again.", style="dim"))


def _heading(section: str, verdict: Verdict) -> Text:
    """With the worst of what is said of it below."""
    worst = next((each.severity for each in verdict.findings if each.section == section), None)
    if worst is None:
        return Text.assemble((section, "bold"), ": ", ("good", "green"))
    return Text.assemble((section, "bold"), ": ", (f"{worst} below", _COLOURS[worst]))


def _gpu(facts: MachineFacts) -> Table:
    table = facts_table()
    table.add_row("cards", "none" if not facts.cards else str(len(facts.cards)))
    driver = facts.driver
    if driver.version is not None:
        newest = f", for CUDA up to {spoken(driver.cuda)}" if driver.cuda is not None else ""
        table.add_row(
            "driver", f"{dotted(driver.version)}{newest}{', open kernel module' if driver.open_module else ''}"
        )
    if facts.cupy.wheels or facts.cards:
        table.add_row("CuPy", Text(_cupy(facts)))
    return table


def _cupy(facts: MachineFacts) -> str:
    cupy = facts.cupy
    if not cupy.wheels:
        return "CuPy not installed"
    wheels = " and ".join(f"{name} {version}" for name, version in cupy.wheels)
    if cupy.compiler is None:
        return wheels
    where = f" ({cupy.compiler_file})" if cupy.compiler_file else ""
    return f"{wheels}, compiling with NVRTC {spoken(cupy.compiler)}{where}"


def _card(card: CardFacts, verdict: Verdict) -> Table:
    table = facts_table()
    name = f"cuda:{card.index}" if card.index is not None else "GPU"
    known = f", compute capability {spoken(card.capability)}" if card.capability is not None else ""
    table.add_row(name, Text(f"{card.name if card.index is not None else label(card)}{known}", style="bold"))
    if card.memory_bytes is not None:
        free = f", {format_bytes(card.free_bytes)} free" if card.free_bytes is not None else ""
        table.add_row("memory", f"{format_bytes(card.memory_bytes)}{free}")
    if (link := _link(card.link)) is not None:
        table.add_row("link", link)
    if card.copy_rate is not None:
        table.add_row("copies", f"{card.copy_rate / 1e9:.1f} GB/s from page-locked memory, measured")
    if card.numa_node is not None:
        table.add_row("NUMA node", str(card.numa_node))
    if card.capability is not None and is_supported(card):
        paths = numeric_paths(card.capability, card.name)
        table.add_row("int4, int8", paths.quantised)
        table.add_row("16 bits", paths.sixteen_bits)
        table.add_row("bf16 models", paths.bf16_checkpoints)
    if card.index not in verdict.usable:
        table.add_row("usable", "no, see below")
    return table


def _link(link: Link) -> str | None:
    """An idle card lowers its generation, which is no fault."""
    generation = link.most_generation or link.generation
    width = link.width or link.most_width
    if not generation or not width:
        return None
    text = f"PCIe {generation}.0 x{width}"
    if link.rate is not None:
        text += f", {link.rate / 1e9:.1f} GB/s at most"
    if link.generation is not None and link.generation < generation:
        text += f" (at {link.generation}.0 now, as idle cards are)"
    return text


def _conclusion(facts: MachineFacts, verdict: Verdict) -> Text:
    if not verdict.runs:
        return Text("No model runs here yet.", style="bold red")
    if not verdict.usable:
        return Text("Models run here, on the CPU alone.", style="bold")
    card = next(each for each in facts.cards if each.index == verdict.usable[0])
    others = (
        f" (also usable: {', '.join(f'cuda:{index}' for index in verdict.usable[1:])})" if verdict.usable[1:] else ""
    )
    return Text(f"Models run here, on {label(card)} and the CPU together{others}.", style="bold green")
