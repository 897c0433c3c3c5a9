"""Reading the small files by which a system tells what it is: whatever is missing or odd is None, nothing raises."""

from pathlib import Path

_MOST = 1 << 16  # bytes: no such file is long


def read_line(path: Path) -> str | None:
    """The file's text, stripped."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode(errors="replace").strip()
    except (OSError, ValueError):
        return None


def read_number(path: Path) -> int | None:
    """None also for 'max' and the like."""
    text = read_line(path)
    return int(text) if text is not None and text.isascii() and text.removeprefix("-").isdigit() else None


def read_list(path: Path) -> tuple[int, ...]:
    """'0-3,8' -> 0, 1, 2, 3, 8, as the kernel lists CPUs and nodes; empty where it is none."""
    numbers: list[int] = []
    for part in (read_line(path) or "").split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
            return ()
        if not 0 <= int(last) - int(first) < 1 << 16:
            return ()
        numbers += range(int(first), int(last) + 1)
    return tuple(numbers)
