"""`moe-offload plan`: options to a server and a wish, and the plan for eyes or machines."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_offload import terminal
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.memory import detect_memory, format_bytes
from moe_offload.models.errors import OptionError
from moe_offload.plan_calibration import host_rates
from moe_offload.plan_model import MOST_BYTES, PlanServer, check_wish, make_plan
from moe_offload.plan_rates import HostRates, ProfileHost
from moe_offload.plan_sizes import ModelSizes, PlannedModel
from moe_offload.plan_table import print_plan, to_dict
from moe_offload.progress import Activity
from moe_offload.transfer.disk_rate import LEAST_FILE, measure_read
from moe_offload.transfer.server_profile import ServerProfile, find_server

logger = logging.getLogger(__name__)

DISK_GBS = 2.6  # of a disk that nobody measured: NVMe on PCIe 3.0
SYSTEM_SHARE = 16  # of a server's memory, one part is the system's


@dataclass(frozen=True, slots=True)
class PlanWishes:
    """The command's options, as they were given."""

    weights: str
    gpu_memory: int | None
    ram: int | None
    context: int | None
    batch: int
    profile: str | None
    threads: int | None
    measure: bool


def plan(name: str, folder: Path, wishes: PlanWishes, *, as_json: bool) -> None:
    """Plan and print. Raises as `load` for the model, and OptionError."""
    _check_sizes(wishes)
    with Activity("planning", enabled=not as_json) as activity:

        def report(what: str, share: float) -> None:
            activity.update(what, 100 * share, 100, "%")

        server = _this_machine(wishes, report) if wishes.profile is None else _profile(wishes.profile, wishes)
        model = PlannedModel(folder)
        context = check_wish(model, wishes.weights, wishes.context, wishes.batch)
        made = make_plan(name, model, server, wishes.weights, context, wishes.batch)
        if wishes.profile is None and made.verdict == "runs from disk":
            report("reading from the disk", 1.0)
            server = _with_disk(server, folder)
            made = make_plan(name, model, server, wishes.weights, context, wishes.batch)
    if as_json:
        terminal.write(json.dumps(to_dict(made), ensure_ascii=False, indent=2) + "\n")
    else:
        print_plan(made)


def _check_sizes(wishes: PlanWishes) -> None:
    for flag, size in (("--gpu-memory", wishes.gpu_memory), ("--ram", wishes.ram)):
        if size is not None and size > MOST_BYTES:
            raise OptionError(
                f"{flag} of {format_bytes(size)} is out of bounds: {format_bytes(MOST_BYTES)} is the most"
            )
    if wishes.threads is not None and wishes.threads < 1:
        raise OptionError(f"--threads {wishes.threads} is out of bounds: it must be at least 1")


def _profile(name: str, wishes: PlanWishes) -> PlanServer:
    try:
        profile = find_server(name)
    except ValueError as error:
        raise OptionError(f"--profile: {error}") from error
    if wishes.measure or wishes.threads is not None:
        raise OptionError(
            f"--measure and --threads are for this machine, but --profile {name} is another: leave them out"
        )
    gpu = _card_bytes(profile, wishes.gpu_memory, name)
    host = ProfileHost(profile)

    def rates(sizes: ModelSizes) -> HostRates:
        return host

    facts = (
        f"the host reads {profile.host_read_gbs:.0f} GB/s",
        "what the program takes between layers is that of a Zen 4 core",
    )
    ram = wishes.ram or profile.host_memory_bytes // SYSTEM_SHARE * (SYSTEM_SHARE - 1)
    return PlanServer(name, profile.simulated, profile if gpu else None, gpu, ram, profile.disk_gbs, rates, facts)


def _card_bytes(profile: ServerProfile, wanted: int | None, name: str) -> int:
    if wanted is None:
        return profile.memory_bytes
    if not profile.has_card:
        raise OptionError(f"--gpu-memory is given, but {name} has no card: leave it out")
    if wanted > profile.memory_bytes:
        raise OptionError(
            f"--gpu-memory of {format_bytes(wanted)} is more than the card of {name} has, "
            f"{format_bytes(profile.memory_bytes)}: give at most that"
        )
    return wanted


def _this_machine(wishes: PlanWishes, report: Any) -> PlanServer:
    from moe_offload.saved_profiles import card_of_this_machine

    threads = wishes.threads or default_threads()
    memory = detect_memory()
    card = card_of_this_machine(memory)
    if card is None and wishes.gpu_memory is not None:
        raise OptionError("--gpu-memory is given, but there is no usable card here: leave it out, or give --profile")
    gpu = 0 if card is None else _card_bytes(card, wishes.gpu_memory, "this machine")

    def rates(sizes: ModelSizes) -> HostRates:
        return host_rates(sizes, threads, measure=wishes.measure, report=report)

    facts = (
        f"{threads} thread{'s' if threads > 1 else ''} of this machine as measured once (--measure: anew)",
        _disk_fact(DISK_GBS, "assumed"),
    )
    return PlanServer("this machine", False, card, gpu, wishes.ram or memory.available, DISK_GBS, rates, facts)


def _with_disk(server: PlanServer, folder: Path) -> PlanServer:
    """With the rate of the disk that the model lies on, measured in a second; as it is where that says nothing."""
    shards = sorted(folder.glob("*.safetensors"), key=lambda shard: shard.stat().st_size)
    if not shards or shards[-1].stat().st_size < LEAST_FILE:
        return server
    try:
        measured = measure_read(folder, shards[-1])
    except OSError as error:
        logger.info("the disk of %s is not measured: %s", folder, error)
        return server
    if not measured.direct:
        return server
    rate = round(measured.rate / 1e9, 2)
    return replace(server, disk_gbs=rate, facts=(*server.facts[:-1], _disk_fact(rate, "measured")))


def _disk_fact(rate: float, how: str) -> str:
    return f"a disk of {rate:g} GB/s, {how}"
