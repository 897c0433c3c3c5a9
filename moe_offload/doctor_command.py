"""`moe-offload doctor`: looks, judges, prints, and ends with a code that scripts can ask for."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_offload import terminal
from moe_offload.models.errors import OptionError

if TYPE_CHECKING:
    from moe_offload.doctor import Verdict
    from moe_offload.doctor_facts import MachineFacts

_CANNOT = 1


def doctor(device: str, as_json: bool, quick: bool = False) -> int:
    """Look at this machine and print. Raises OptionError for what is no real device, and for a torch that is broken.

    quick: measure nothing.
    """
    with _saying("looking at this machine", not as_json) as say:
        try:
            import torch  # noqa: F401
        except Exception as error:  # a library that is missing, or one that the loader does not take
            raise OptionError(
                f"torch cannot be imported ({error}): pip uninstall -y torch && pip install torch"
            ) from error
        from moe_offload.doctor import judge
        from moe_offload.doctor_facts import detect_machine
        from moe_offload.doctor_table import print_verdict
        from moe_offload.transfer.find_device import parse_device

        try:
            choice = parse_device(device)
        except ValueError as error:
            raise OptionError(f"--device {device}: {error}") from error
        if choice.kind == "virtual":
            raise OptionError(f"--device {device} is simulated, and runs anywhere: give auto, cpu, cuda or cuda:N")
        facts = detect_machine(measure=not quick, report=say)
    verdict = judge(facts, choice)
    if as_json:
        terminal.write(json.dumps(to_dict(facts, verdict), ensure_ascii=False, indent=2) + "\n")
    else:
        print_verdict(facts, verdict)
    if verdict.refused is not None:
        terminal.error(f"{choice} cannot be used: {verdict.refused}")
    return 0 if verdict.good else _CANNOT


@contextmanager
def _saying(what: str, enabled: bool) -> Iterator[Callable[[str], None]]:
    """A line on the terminal from the start, before libraries are imported, that says what is being done."""
    console = terminal.console()
    if not (enabled and console.is_terminal):
        yield lambda _: None
        return
    with console.status(what) as status:
        yield lambda detail: status.update(f"{what}: {detail}")


def to_dict(facts: "MachineFacts", verdict: "Verdict") -> dict[str, Any]:
    """All facts and findings, of plain types; versions as [535, 183, 1]."""
    return {
        "runs": verdict.runs,
        "device": f"cuda:{verdict.usable[0]}" if verdict.usable else "cpu",
        "usable_cards": list(verdict.usable),
        "refused": verdict.refused,
        "findings": [asdict(each) for each in verdict.findings],
        "machine": asdict(facts),
    }
