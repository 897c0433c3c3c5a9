"""The commands that measure, foresee and check: their options, checked, and handed on.

torch and transformers are imported by a command when it runs, not with this module.
"""

from pathlib import Path
from typing import Annotated

import typer

from moe_offload import cli_options
from moe_offload.app import app
from moe_offload.opening import ModelOptions, find_folder, import_libraries, open_model
from moe_offload.sizes import parse_size


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
