"""`moe-offload profiles`: the servers that can be simulated or planned for, where their figures are from, and a new one
of this machine.
"""

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_offload import terminal
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.memory import format_bytes
from moe_offload.models.errors import OptionError
from moe_offload.progress import Activity
from moe_offload.transfer.profile_file import check_name, profile_folder, read_profile, saved_names, write_profile
from moe_offload.transfer.server_profile import PROFILES, ServerProfile, find_server

_WIDTH = 100  # where stdout is no terminal


def list_profiles(name: str | None, as_json: bool) -> None:
    """Print all, or one with the source of every number. A saved one that cannot be read is a note."""
    if name is not None:
        try:
            found = [find_server(name)]
        except ValueError as error:
            raise OptionError(str(error)) from error
    else:
        found = [*PROFILES.values(), *_saved()]
    if as_json:
        content = [_to_dict(profile) for profile in found]
        terminal.write(json.dumps(content if name is None else content[0], indent=2) + "\n")
    else:
        _print(found, with_sources=name is not None)


def save_profile(name: str, threads: int | None, as_json: bool) -> None:
    """Measure this machine and keep it. Prints the file. Raises OptionError."""
    if threads is not None and threads < 1:
        raise OptionError(f"--threads {threads} is out of bounds: it must be at least 1")
    try:
        check_name(name)
    except ValueError as error:
        raise OptionError(str(error)) from error
    with Activity("measuring this machine", enabled=not as_json) as activity:
        from moe_offload.saved_profiles import measure_machine

        profile = measure_machine(
            name, threads or default_threads(), lambda what, share: activity.update(what, 100 * share, 100, "%")
        )
    try:
        path = write_profile(profile)
    except OSError as error:
        raise OptionError(f"the profile cannot be kept in {profile_folder()}: {error.strerror or error}") from error
    if as_json:
        terminal.write(json.dumps(_to_dict(profile) | {"path": str(path)}, indent=2) + "\n")
    else:
        terminal.write(f"{path}\n")
        terminal.figures(_line(profile))


def _saved() -> list[ServerProfile]:
    found = []
    for name in saved_names():
        try:
            found.append(read_profile(name))
        except ValueError as error:
            terminal.note(str(error))
    return found


def _to_dict(profile: ServerProfile) -> dict[str, Any]:
    content = {key: value for key, value in asdict(profile).items() if key not in ("expert_tables", "sources")}
    content["sources"] = [{"fields": list(each.fields), "text": each.text} for each in profile.sources]
    return content


def _line(profile: ServerProfile) -> str:
    return f"{profile.description}: memory {profile.host_read_gbs:.1f} GB/s, {profile.host_flops / 1e9:.0f} Gop/s"


def _print(profiles: list[ServerProfile], *, with_sources: bool) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for title in ("card's memory", "GB/s", "Tflop/s", "link GB/s", "host GB/s", "host's memory", "disk GB/s"):
        table.add_column(title, justify="right")
    servers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    servers.add_column(no_wrap=True)
    servers.add_column(style="dim")
    for each in profiles:
        card = (format_bytes(each.memory_bytes), f"{each.memory_gbs:.0f}", f"{each.flops / 1e12:.1f}",
                f"{each.link_gbs:.1f}") if each.has_card else ("-",) * 4  # fmt: skip
        table.add_row(
            each.name, *card, f"{each.host_read_gbs:.0f}", format_bytes(each.host_memory_bytes), f"{each.disk_gbs:.1f}",
        )  # fmt: skip
        servers.add_row(each.name, f"{each.description} ({'simulated' if each.simulated else 'saved'})")
    parts: list[Table | Text] = [table, servers]
    if with_sources:
        origins = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        origins.add_column(style="dim")
        origins.add_column()
        for source in profiles[0].sources:
            origins.add_row(", ".join(source.fields), source.text)
        parts += [Text(), origins]
    else:
        parts.append(
            Text(
                "Rates are those that programs reach; moe-offload profiles show NAME says where they are from.",
                style="dim",
            )
        )
    console.print(Group(*parts))
