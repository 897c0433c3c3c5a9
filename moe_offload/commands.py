"""The commands that use models: their options, checked, and handed on.

torch and transformers are imported by a command when it runs, not with this module.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_offload import cli_options, terminal
from moe_offload.app import app
from moe_offload.models.errors import OptionError
from moe_offload.opening import ModelOptions, find_folder, import_libraries, open_model
from moe_offload.sampling import Sampling
from moe_offload.sizes import parse_size


@app.command(
    help="Continue a text, printing it as it comes.\n\n"
    "The text goes to stdout, everything else to stderr. "
    "A line end at the very end of a file or of stdin is not part of the prompt."
)
def generate(
    model: cli_options.Model,
    prompt: cli_options.Prompt = None,
    prompt_file: cli_options.PromptFile = None,
    chat: cli_options.Chat = None,
    temperature: cli_options.Temperature = None,
    top_k: cli_options.TopK = None,
    top_p: cli_options.TopP = None,
    min_p: cli_options.MinP = None,
    repetition_penalty: cli_options.RepetitionPenalty = None,
    greedy: cli_options.Greedy = False,
    seed: cli_options.Seed = None,
    max_new_tokens: cli_options.MaxNewTokens = None,
    threads: cli_options.Threads = None,
    weights: cli_options.Weights = "auto",
    dtype: cli_options.Dtype = "auto",
    memory_limit: cli_options.MemoryLimit = None,
    activations: cli_options.Activations = "auto",
    pack_dir: cli_options.PackDir = None,
    dense: cli_options.Dense = "auto",
    attn_implementation: cli_options.AttnImplementation = None,
    device: cli_options.Device = "auto",
    gpu_memory: cli_options.GpuMemory = None,
    ram: cli_options.Ram = None,
    policy: cli_options.PolicyName = "ours",
    predictor: cli_options.Predictor = "auto",
    adapt: cli_options.Adapt = True,
    stats: cli_options.Stats = False,
    trace: cli_options.Trace = None,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed, max_new_tokens)
    options = ModelOptions(
        model, weights, dtype, threads, parse_size(memory_limit, "--memory-limit"), attn_implementation,
        revision, verbose, show_progress=not as_json, activations=activations, pack_dir=pack_dir, dense=dense,
        device=device, gpu_memory=parse_size(gpu_memory, "--gpu-memory"), ram=parse_size(ram, "--ram"), policy=policy,
        predictor=predictor, adapt=adapt,
    )  # fmt: skip
    text = _prompt(prompt, prompt_file)
    opened = open_model(options)
    from moe_offload.completion import complete

    return complete(opened, text, sampling, chat=chat, as_json=as_json, stats=stats, trace=trace)


@app.command(
    help="Talk with a model that is tuned for it.\n\n"
    "Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. "
    "From a pipe each line is one turn; with --json each answer is one JSON object on a line."
)
def chat(
    model: cli_options.Model,
    system: cli_options.System = "",
    temperature: cli_options.Temperature = None,
    top_k: cli_options.TopK = None,
    top_p: cli_options.TopP = None,
    min_p: cli_options.MinP = None,
    repetition_penalty: cli_options.RepetitionPenalty = None,
    greedy: cli_options.Greedy = False,
    seed: cli_options.Seed = None,
    max_new_tokens: cli_options.MaxNewTokens = None,
    threads: cli_options.Threads = None,
    weights: cli_options.Weights = "auto",
    dtype: cli_options.Dtype = "auto",
    memory_limit: cli_options.MemoryLimit = None,
    activations: cli_options.Activations = "auto",
    pack_dir: cli_options.PackDir = None,
    dense: cli_options.Dense = "auto",
    attn_implementation: cli_options.AttnImplementation = None,
    device: cli_options.Device = "auto",
    gpu_memory: cli_options.GpuMemory = None,
    ram: cli_options.Ram = None,
    policy: cli_options.PolicyName = "ours",
    predictor: cli_options.Predictor = "auto",
    adapt: cli_options.Adapt = True,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed, max_new_tokens)
    options = ModelOptions(
        model, weights, dtype, threads, parse_size(memory_limit, "--memory-limit"), attn_implementation,
        revision, verbose, show_progress=not as_json, activations=activations, pack_dir=pack_dir, dense=dense,
        device=device, gpu_memory=parse_size(gpu_memory, "--gpu-memory"), ram=parse_size(ram, "--ram"), policy=policy,
        predictor=predictor, adapt=adapt,
    )  # fmt: skip
    _require_text(system, "--system")
    opened = open_model(options)
    from moe_offload.completion import converse

    return converse(opened, sampling, system=system, as_json=as_json)


@app.command(help="Show what a model is and what it needs, without loading its weights.")
def info(
    model: cli_options.Model,
    memory_limit: cli_options.MemoryLimit = None,
    pack_dir: cli_options.PackDir = None,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> None:
    options = ModelOptions(
        model, memory_limit=parse_size(memory_limit, "--memory-limit"), revision=revision, verbose=verbose,
        show_progress=not as_json, pack_dir=pack_dir,
    )  # fmt: skip
    folder = find_folder(options, shards=False)
    import_libraries(options)
    from moe_offload.report import make_report
    from moe_offload.report_table import print_report

    report = make_report(model, folder, options.engine_options())
    if as_json:
        terminal.write(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n")
    else:
        print_report(report)


@app.command(
    help="Convert a model's experts and other linears to fewer bits, once, into files that later runs map.\n\n"
    "generate and chat do it by themselves when they need to; they find the files by what the model holds. "
    "What was interrupted goes on where it stopped. Prints the files' names: the experts', then the others' (int8)."
)
def convert(
    model: cli_options.Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", "--pack-dir", metavar="FOLDER", help="Where to put them, instead of the cache folder."
        ),
    ] = None,
    weights: cli_options.Weights = "auto",
    threads: cli_options.Threads = None,
    memory_limit: cli_options.MemoryLimit = None,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    options = ModelOptions(
        model, weights, threads=threads, memory_limit=parse_size(memory_limit, "--memory-limit"), revision=revision,
        verbose=verbose, show_progress=not as_json, pack_dir=output,
    )  # fmt: skip
    folder = find_folder(options)
    import_libraries(options)
    from moe_offload.convert_model import convert_model

    return convert_model(options, folder, as_json=as_json)


@app.command(
    help="Write down which experts a model's routers choose for a text, token by token, for training and measuring "
    "predictors.\n\n"
    "Runs on the CPU. What was interrupted goes on where it stopped. Prints the trace's name."
)
def trace(
    model: cli_options.Model,
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Text, cut into sequences; or a .jsonl file with a prompt on each line: "
            '{"prompt": "..."} or {"messages": [...]}.',
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The trace's file.")],
    new_tokens: Annotated[int, typer.Option(help="Generate so many tokens behind each sequence, and trace them.")] = 0,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens of a sequence; of a prompt at most.")] = 256,
    max_tokens: Annotated[int | None, typer.Option(help="Stop before there are more.", show_default=False)] = None,
    projected: Annotated[int, typer.Option(help="Dimensions that are kept of hidden states.")] = 128,
    like: Annotated[
        Path | None,
        typer.Option(metavar="TRACE", help="Use this trace's projections; all sequences are for testing then."),
    ] = None,
    note: Annotated[str, typer.Option(help="Where the text came from, for whoever reads the trace.")] = "",
    threads: cli_options.Threads = None,
    weights: cli_options.Weights = "auto",
    dtype: cli_options.Dtype = "auto",
    memory_limit: cli_options.MemoryLimit = None,
    pack_dir: cli_options.PackDir = None,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    _require_text(note, "--note")
    options = ModelOptions(
        model, weights, dtype, threads, parse_size(memory_limit, "--memory-limit"), revision=revision, verbose=verbose,
        show_progress=not as_json, pack_dir=pack_dir, device="cpu",
    )  # fmt: skip
    opened = open_model(options)
    from moe_offload import trace_command

    wishes = trace_command.TraceWishes(prompts, output, new_tokens, sequence_tokens, max_tokens, projected, like, note)
    return trace_command.trace(opened, wishes, as_json=as_json)


@app.command(
    help="Train the predictor of a model's next experts, which --predictor auto then finds.\n\n"
    "It learns from text like the model's future work, or from a trace of it; recall is measured on sequences that "
    "were held back. Runs on the CPU. Prints the predictor's file."
)
def train_predictor(
    model: cli_options.Model,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to trace the model on, as of moe-offload trace; the trace is removed then."
        ),
    ] = None,
    trace: Annotated[Path | None, typer.Option(metavar="TRACE", help="A trace of this model instead.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="The predictor's file, instead of the cache folder."),
    ] = None,
    passes: Annotated[int, typer.Option(help="Over the training tokens, at most.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Of the prompts, at most.")] = 400_000,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens that the prompts are cut into.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed gives the same predictor.")] = 0,
    threads: cli_options.Threads = None,
    weights: cli_options.Weights = "auto",
    dtype: cli_options.Dtype = "auto",
    memory_limit: cli_options.MemoryLimit = None,
    pack_dir: cli_options.PackDir = None,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    options = ModelOptions(
        model, weights, dtype, threads, parse_size(memory_limit, "--memory-limit"), revision=revision, verbose=verbose,
        show_progress=not as_json, pack_dir=pack_dir, device="cpu",
    )  # fmt: skip
    opened = open_model(options)
    from moe_offload import train_command

    wishes = train_command.TrainWishes(prompts, trace, output, passes, max_tokens, sequence_tokens, seed)
    return train_command.train_predictor(opened, wishes, as_json=as_json)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of the prompt, from wherever it comes; OptionError when there is none."""
    if prompt is not None and prompt_file is not None:
        raise OptionError("--prompt and --prompt-file exclude each other: give one")
    if prompt is not None:
        text = _require_text(prompt, "--prompt")
    elif prompt_file is not None:
        text = cli_options.read_file(prompt_file)
    else:
        if sys.stdin.isatty():
            terminal.note("type the prompt and end it with Ctrl-D on a line of its own (or give it with -p)")
        text = cli_options.read_utf8(sys.stdin.buffer.read(), "standard input")
    if not text:
        raise OptionError("the prompt is empty: give -p TEXT, --prompt-file FILE or text on standard input")
    return text


def _require_text(text: str, flag: str) -> str:
    """An argument's bytes that are no UTF-8 come as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{flag} is not UTF-8 text (character {error.start})") from error
    return text
