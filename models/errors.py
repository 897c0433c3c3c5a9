"""What can go wrong with a model the user names, as one small tree of exceptions.

    MoeOffloadError (ValueError)
    ├── CheckpointError         the files are missing, damaged or do not fit the architecture
    ├── UnsupportedModelError   the architecture or its weight format is not one we run
    ├── OptionError             an option's value is out of its bounds
    ├── PackError               converted weights cannot be kept on disk
    └── NotEnoughMemoryError    what must be in memory does not fit

Every message says what was wrong, with the value and the bound, and what to do. The command line prints the message
alone and exits with 2.
"""


class MoeOffloadError(ValueError):
    """Base of everything this package raises for a cause the user can mend."""


class CheckpointError(MoeOffloadError):
    """A checkpoint's files are missing, damaged, or do not fit its configuration."""


class UnsupportedModelError(MoeOffloadError):
    """An architecture or a weight format that the engine does not run."""


class OptionError(MoeOffloadError):
    """An option's value is unknown or out of its bounds."""


class PackError(MoeOffloadError):
    """Converted weights cannot be kept where they should be: the disk is full, or not writable."""


class NotEnoughMemoryError(MoeOffloadError):
    """What must be in memory does not fit in what the machine has."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line for a message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # A heading says nothing without what stands below it.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
