"""From the options to an open device, or none: what speaks against it is said before anything is loaded."""

import logging

from moe_offload.memory import format_bytes
from moe_offload.models.errors import NotEnoughMemoryError, OptionError
from moe_offload.options import Options
from moe_offload.transfer.accelerator import Accelerator, DeviceError
from moe_offload.transfer.find_device import open_accelerator, parse_device

logger = logging.getLogger(__name__)


def open_device(options: Options, needed: int) -> Accelerator | None:
    """The device that the options name; None for the CPU alone. needed: bytes of the non-expert weights.

    Raises OptionError for a device that is not there and a budget larger than it, NotEnoughMemoryError for one that has
    no room for the non-expert weights; with device="auto" the model then runs on the CPU, and the log says so.
    """
    choice = parse_device(options.device)
    try:
        accelerator = open_accelerator(choice, options.gpu_memory)
    except (ValueError, DeviceError) as error:
        raise OptionError(str(error)) from error
    if accelerator is None:
        if options.gpu_memory is not None:
            raise OptionError(f"gpu_memory is given, but device={options.device!r} uses no GPU: leave it out")
        return None
    if needed <= accelerator.budget:
        return accelerator
    text = (
        f"the non-expert weights need {format_bytes(needed)}, but {accelerator.name} has "
        f"{format_bytes(accelerator.budget)} for them: raise gpu_memory (--gpu-memory), or take device cpu"
    )
    accelerator.close()
    if choice.kind != "auto":
        raise NotEnoughMemoryError(text)
    logger.warning("%s; the model runs on the CPU", text)
    return None
