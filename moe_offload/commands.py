"""The commands: their options, checked, and handed on.

torch and transformers are imported by a command when it runs, not with this module.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_offload import __version__, cli_options, terminal
from moe_offload.models.errors import OptionError
from moe_offload.opening import ModelOptions, find_folder, import_libraries, open_model
from moe_offload.sampling import Sampling
from moe_offload.sizes import parse_size

app = typer.Typer(
    help="Run Hugging Face Mixture-of-Experts models on the servers people already have.",
    epilog="Try it: moe-offload generate demo -p 'def main():'",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-offload {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


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
    help="Measure how fast a model reads prompts and writes text here, in the form of llama-bench.\n\n"
    "pp512: prompts of 512 tokens, up to the first new one. tg128: 128 tokens behind it. @16: 16 sequences at once. "
    "t/s is mean ± standard deviation of the repeats, all else medians; json and jsonl have every sample. "
    "Ctrl-C ends it early and shows what there is."
)
def bench(
    model: cli_options.Model,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", "-p", metavar="N,...|none", help="Prompts to time.")
    ] = "512",
    new_tokens: Annotated[
        str, typer.Option("--new-tokens", "-n", metavar="N,...|none", help="Lengths of generation to time.")
    ] = "128",
    batch: Annotated[str, typer.Option("--batch", "-b", metavar="N,...", help="Sequences at once.")] = "1",
    depth: Annotated[int, typer.Option("--depth", "-d", help="Tokens of text that generation begins behind.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Runs of each test that count.")] = 5,
    warm_up: Annotated[int, typer.Option(help="Runs of each test before them, which do not.")] = 1,
    random_tokens: Annotated[
        bool, typer.Option("--random-tokens", help="No text but random tokens, which route unrealistically.")
    ] = False,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to take, instead of Python's standard library.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="[table|md|csv|json|jsonl]", help="Form of the figures on stdout.")
    ] = "table",
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
    options = ModelOptions(
        model, weights, dtype, threads, parse_size(memory_limit, "--memory-limit"), attn_implementation,
        revision, verbose, show_progress=not as_json, activations=activations, pack_dir=pack_dir, dense=dense,
        device=device, gpu_memory=parse_size(gpu_memory, "--gpu-memory"), ram=parse_size(ram, "--ram"), policy=policy,
        predictor=predictor, adapt=adapt,
    )  # fmt: skip
    from moe_offload import bench_command

    wishes = bench_command.BenchWishes(
        prompt_tokens, new_tokens, batch, depth, repeats, warm_up, random_tokens, prompt_file,
        bench_command.chosen_output(output, as_json),
    )  # fmt: skip
    return bench_command.bench(options, wishes)


@app.command(
    name="bench-cpu",
    help="Measure what this CPU's kernels reach of what its memory gives.\n\n"
    "One layer of experts in each format; about 20 seconds, more where kernels compile first. "
    "Ctrl-C ends it early and shows what there is.",
)
def bench_cpu(
    shape: Annotated[
        str, typer.Option(metavar="H,I", help="Hidden and intermediate size of an expert; by default Qwen3's.")
    ] = "2048,768",
    threads: cli_options.Threads = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    from moe_offload import bench_cpu_command

    return bench_cpu_command.bench_cpu(shape, threads, as_json)


@app.command(
    help="Show what this machine has, what it reaches, whether it fits together, and what mends what does not.\n\n"
    "Reads memory and disks for a second or two each. "
    "Ends with 0 where models can run, if only on the CPU, and with 1 where they cannot or where the device that was "
    "asked for cannot be used."
)
def doctor(
    device: Annotated[
        str, typer.Option(metavar="[auto|cpu|cuda|cuda:N]", help="Say whether models can run on this one.")
    ] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure nothing: neither memory nor disks nor copies to cards.")
    ] = False,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> int:
    from moe_offload import doctor_command

    return doctor_command.doctor(device, as_json, quick)


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


@app.command(
    help="Check that what runs here computes what transformers does, and what fewer bits cost.\n\n"
    "Logits on a text are held against transformers' own model with eager experts, which runs layer by layer and need "
    "not fit in memory. Each sequence's last tokens are given one by one, as when text is generated. "
    "Ends with 1 where the difference is larger than asked for."
)
def verify(
    model: cli_options.Model,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text, or a .jsonl file as of moe-offload trace; by default a module of Python's library.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare on, at most.")] = 2048,
    sequence_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the text is cut into; 512 by default.", show_default=False)
    ] = None,
    decode_tokens: Annotated[int, typer.Option(help="Tokens of each sequence that are given one by one.")] = 16,
    reference_dtype: Annotated[
        str, typer.Option(metavar="[auto|bf16|f16|f32]", help="What the reference computes in; auto: as stored.")
    ] = "auto",
    max_perplexity_change: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="End with 1 where perplexity rises by more.", show_default=False),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            metavar="PERCENT",
            help="End with 1 where the most probable token is the same at fewer positions.",
            show_default=False,
        ),
    ] = None,
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
    options = ModelOptions(
        model, weights, dtype, threads, parse_size(memory_limit, "--memory-limit"), attn_implementation,
        revision, verbose, show_progress=not as_json, activations=activations, pack_dir=pack_dir, dense=dense,
        device=device, gpu_memory=parse_size(gpu_memory, "--gpu-memory"), ram=parse_size(ram, "--ram"), policy=policy,
        predictor=predictor, adapt=adapt,
    )  # fmt: skip
    opened = open_model(options)
    from moe_offload import verify_command

    wishes = verify_command.VerifyWishes(
        prompts, tokens, sequence_tokens, decode_tokens, reference_dtype, max_perplexity_change, min_top1
    )
    return verify_command.verify(opened, wishes, as_json=as_json)


@app.command(
    help="Say before anything is loaded what goes where, what does not fit and what would make it fit, and how fast "
    "the model would be: on this machine, or on a server by its profile.\n\n"
    "Needs a model's configuration only. The first plan on this machine measures it for some seconds."
)
def plan(
    model: cli_options.Model,
    weights: cli_options.Weights = "auto",
    gpu_memory: cli_options.GpuMemory = None,
    ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The host's memory for the model; by default what is free.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions of each sequence; by default 4096.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="A server of moe-offload profiles, instead of this machine.")
    ] = None,
    threads: cli_options.Threads = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine anew.")] = False,
    revision: cli_options.Revision = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> None:
    options = ModelOptions(model, revision=revision, verbose=verbose, show_progress=not as_json)
    sizes = parse_size(gpu_memory, "--gpu-memory"), parse_size(ram, "--ram")
    folder = find_folder(options, shards=False)
    import_libraries(options)
    from moe_offload import plan_command

    wishes = plan_command.PlanWishes(weights, *sizes, context, batch, profile, threads, measure)
    plan_command.plan(model, folder, wishes, as_json=as_json)


profiles_app = typer.Typer(
    help="List the servers that plan and --device virtual:NAME know, show one, or save this machine as one.",
    invoke_without_command=True,
)
app.add_typer(profiles_app, name="profiles")


@profiles_app.callback()
def profiles(context: typer.Context, as_json: cli_options.Json = False, verbose: cli_options.Verbose = False) -> None:
    if context.invoked_subcommand is None:
        from moe_offload import profile_command

        profile_command.list_profiles(None, as_json)


@profiles_app.command("show", help="One profile, with the source of every number.")
def show_profile(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> None:
    from moe_offload import profile_command

    profile_command.list_profiles(name, as_json)


@profiles_app.command("save", help="Measure this machine and keep it under a name. Prints the file.")
def save_profile(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    threads: cli_options.Threads = None,
    as_json: cli_options.Json = False,
    verbose: cli_options.Verbose = False,
) -> None:
    from moe_offload import profile_command

    profile_command.save_profile(name, threads, as_json)


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
