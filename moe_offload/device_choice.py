"""From the options to an open device, or none: what is missing is said, and how to get it.

With device="auto" whatever goes wrong with the card is one warning, and the model runs on the CPU. A card that was
named is an error instead. Where there is no NVIDIA card at all nobody is warned of its absence.
"""

import logging
from contextlib import suppress
from pathlib import Path

from moe_offload.gpu_kernels.launch import KernelError
from moe_offload.memory import format_bytes
from moe_offload.models.errors import MoeOffloadError, NotEnoughMemoryError, OptionError, first_line
from moe_offload.options import Options
from moe_offload.transfer import find_device
from moe_offload.transfer.accelerator import Accelerator, DeviceError, DeviceLostError, OutOfDeviceMemoryError
from moe_offload.transfer.card_probes import read_driver
from moe_offload.transfer.cuda_errors import device_error
from moe_offload.transfer.find_device import CudaFacts, cuda_problem, open_accelerator, parse_device

logger = logging.getLogger(__name__)

_ROOT = Path("/")
_ON_THE_CPU = "%s; the model runs on the CPU"
# What setting up a device may raise: its own errors are RuntimeErrors, as are torch's and the kernels'.
SETUP_ERRORS = (MoeOffloadError, MemoryError, RuntimeError)


def open_device(options: Options, needed: int) -> Accelerator | None:
    """The device that the options name; None for the CPU alone. needed: bytes of the non-expert weights.

    Raises OptionError for a device that is not there and a budget larger than it, NotEnoughMemoryError for one that has
    no room for the non-expert weights; with device="auto" the model then runs on the CPU, and the log says so.
    """
    choice = parse_device(options.device)
    auto = choice.kind == "auto"
    facts = find_device.detect_cuda() if auto or choice.kind == "cuda" else None
    try:
        accelerator = open_accelerator(choice, options.gpu_memory, facts=facts)
    except DeviceError as error:
        problem = _problem(error, str(choice)) or OptionError(str(error))
        if not auto:
            raise problem from error
        logger.warning(_ON_THE_CPU, problem)
        return None
    except ValueError as error:
        raise OptionError(str(error)) from error
    if accelerator is None:
        missing = "" if facts is None else cuda_problem(facts, 0) or ""
        if options.gpu_memory is not None:
            why = f" ({missing})" if missing else ""
            raise OptionError(f"gpu_memory is given, but device={options.device!r} uses no GPU{why}: leave it out")
        if missing:
            logger.log(logging.WARNING if _there_is_a_card(facts) else logging.INFO, _ON_THE_CPU, missing)
        return None
    if needed <= accelerator.budget:
        return accelerator
    text = (
        f"the non-expert weights need {format_bytes(needed)}, but {accelerator.name} has "
        f"{format_bytes(accelerator.budget)} for them: raise gpu_memory (--gpu-memory), or take device cpu"
    )
    accelerator.close()
    if not auto:
        raise NotEnoughMemoryError(text)
    logger.warning(_ON_THE_CPU, text)
    return None


def give_up_device(accelerator: Accelerator, error: Exception, options: Options) -> None:
    """Close a device that failed while the model was put on it. With device="auto" the log says so; else raises what
    the user can do, a NotEnoughMemoryError or an OptionError, and `error` itself where it is about nothing of the kind.
    """
    with suppress(DeviceError):
        accelerator.close()
    problem = _problem(error, accelerator.name, accelerator.budget)
    if problem is None:
        raise error
    if parse_device(options.device).kind != "auto":
        if problem is error:
            raise error
        raise problem from error
    logger.warning(_ON_THE_CPU, problem)


def _problem(error: BaseException, device: str, budget: int | None = None) -> MoeOffloadError | None:
    """What a failure of the device comes to for the user; None for one that is about something else."""
    cause = error.__cause__
    if isinstance(error, NotEnoughMemoryError) and isinstance(cause, OutOfDeviceMemoryError) and cause.__cause__:
        error = cause  # it was the device itself that had no more, not the budget
    if isinstance(error, MoeOffloadError):
        return error
    if isinstance(error, KernelError):
        return OptionError(f"{error}: see what moe-offload doctor says, or take device cpu")
    if isinstance(error, MemoryError) and not isinstance(error, DeviceError):  # before its text is looked at
        return NotEnoughMemoryError(
            f"page-locked host memory for {device} is refused ({first_line(error)}): lower ram (--ram), "
            "or take device cpu"
        )
    meant = device_error(error, device)
    if isinstance(meant, OutOfDeviceMemoryError):
        if meant is error and error.__cause__ is None and budget is not None:  # by our own count
            return NotEnoughMemoryError(f"{meant}: raise gpu_memory (--gpu-memory), or take device cpu")
        given = "" if budget is None else f" (the model was given {format_bytes(budget)})"
        return NotEnoughMemoryError(
            f"{meant}{given}: lower gpu_memory (--gpu-memory), end other programs on the card, or take device cpu"
        )
    if isinstance(meant, DeviceLostError):
        return OptionError(f"{meant}: see what nvidia-smi and moe-offload doctor say, or take device cpu")
    return None if meant is None else OptionError(str(meant))


def _there_is_a_card(facts: CudaFacts | None) -> bool:
    """Whether CUDA sees a card, or the bus has one of NVIDIA's that CUDA does not see."""
    return facts is not None and bool(facts.cards or read_driver(_ROOT).on_bus)
