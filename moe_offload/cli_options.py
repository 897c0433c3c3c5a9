"""The options that commands share, as typer wants them declared, and values with a unit."""

from pathlib import Path
from typing import Annotated

import typer

from moe_offload.models.errors import OptionError
from moe_offload.scheduling.policy_names import POLICIES

_SAMPLING = "Sampling (default: what the model's generation_config says)"
_RUNNING = "How the model runs"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A folder in Hugging Face format, the id of a model on the Hub, or 'demo', "
        "the small model in this package.",
    ),
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")]
PromptFile = Annotated[Path | None, typer.Option(help="Read the prompt from a file; without either, from stdin.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        show_default=False,
        help="--chat: answer the prompt, put into the model's chat template (for models tuned to "
        "instructions). --raw, the default: continue the prompt's text as it is.",
    ),
]
System = Annotated[str, typer.Option(help="What the model is told before the conversation.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Higher is more varied; 0 always takes the most probable token.",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Choose among the K most probable tokens; 0: among all.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Choose among the most probable tokens that make up this probability.",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Leave out tokens less probable than this share of the best.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, tokens seen before become less probable.", rich_help_panel=_SAMPLING),
]
Greedy = Annotated[
    bool,
    typer.Option("--greedy", help="Always take the most probable token.", rich_help_panel=_SAMPLING),
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", rich_help_panel=_SAMPLING)]
MaxNewTokens = Annotated[int | None, typer.Option(help="Length of an answer at most.", rich_help_panel=_SAMPLING)]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; by default one for each physical core.", rich_help_panel=_RUNNING),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="[auto|int8|int4|bf16|f16|f32|fp8|mxfp4]",
        help="Format of the experts. int8 and int4 convert them once and keep them on disk; "
        "auto: as stored if that fits in memory, else int8, else int4.",
        rich_help_panel=_RUNNING,
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        metavar="[auto|int16|int8|f32]",
        help="Precision of activations where experts are quantised; f32 is exact and slower.",
        rich_help_panel=_RUNNING,
    ),
]
Dense = Annotated[
    str,
    typer.Option(
        metavar="[auto|stored|int8|int4]",
        help="Format of linears outside of the experts; auto: int8 where experts are converted, else as stored.",
        rich_help_panel=_RUNNING,
    ),
]
PackDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where converted weights are kept, instead of the user's cache folder.",
        rich_help_panel=_RUNNING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="[auto|bf16|f16|f32]",
        help="Format of everything else; auto: as stored, but float16 or float32 for cards without bfloat16.",
        rich_help_panel=_RUNNING,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory the model may take, such as 512MB, 8GB or 8GiB.",
        rich_help_panel=_RUNNING,
    ),
]
_DEVICES = "GPU and CPU together"
Device = Annotated[
    str,
    typer.Option(
        metavar="[auto|cpu|cuda|cuda:N|virtual:PROFILE]",
        help="auto: the first usable NVIDIA card, else the CPU alone. virtual simulates a server, such as "
        "virtual:gtx1080ti: real numbers, modelled times.",
        rich_help_panel=_DEVICES,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of the card that the model may take, such as 6GiB; by default what is free.",
        rich_help_panel=_DEVICES,
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Page-locked memory for experts on their way to the card; by default as much as the experts need.",
        rich_help_panel=_DEVICES,
    ),
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar=f"[{'|'.join(POLICIES)}]",
        help="Who decides which expert runs where; all but 'ours' are there to compare with.",
        rich_help_panel=_DEVICES,
    ),
]
Predictor = Annotated[
    str,
    typer.Option(
        metavar="[auto|off|look-ahead|FILE]",
        help="What says which experts the next layers will want. auto: what train-predictor made for this model, if it "
        "did; look-ahead: the next layers' own routers; off: popularity.",
        rich_help_panel=_DEVICES,
    ),
]
Adapt = Annotated[
    bool,
    typer.Option(
        "--adapt/--no-adapt",
        help="Let the predictor follow what the routers choose, as long as that makes it better.",
        rich_help_panel=_DEVICES,
    ),
]
Stats = Annotated[
    bool,
    typer.Option("--stats", help="Afterwards, say what ran where and where the time went.", rich_help_panel=_DEVICES),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a timeline of streams and CPU work, for ui.perfetto.dev or chrome://tracing.",
        rich_help_panel=_DEVICES,
    ),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="As in transformers: sdpa, eager, ...", rich_help_panel=_RUNNING),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the Hub.", rich_help_panel=_RUNNING),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable results on stdout, no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what transformers and this program log.")]


def read_utf8(data: bytes, where: str) -> str:
    """Text from a file or pipe, its last line end taken off.

    Raises OptionError for what is no UTF-8.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{where} is not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start} ({error.reason})"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def read_file(path: Path) -> str:
    """A prompt file. Raises OptionError when it cannot be read."""
    try:
        return read_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionError(f"cannot read the prompt file {path}: {error.strerror or error}") from error
