"""`moe-offload bench`: options to tests, a model to measure, and its figures on stdout."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from moe_offload import bench_model, cli_options, terminal
from moe_offload.bench_model import ModelBench, Test, require_context
from moe_offload.bench_progress import RunProgress
from moe_offload.bench_table import OUTPUTS, Facts, print_results, written
from moe_offload.bench_text import RandomTokens, RealText, Tokens, standard_library
from moe_offload.loading import read_config, require_experts
from moe_offload.models.errors import CheckpointError, MoeOffloadError, OptionError
from moe_offload.models.spec import MoeSpec
from moe_offload.opening import ModelOptions, OpenedModel, find_folder, import_libraries
from moe_offload.prompts import max_context, read_tokenizer

_INTERRUPTED = 130
_NONE = "none"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")  # those of the others have their own message


@dataclass(frozen=True, slots=True)
class BenchWishes:
    """The command's options as they were typed. Raises OptionError for what is out of bounds."""

    prompt_tokens: str = "512"
    new_tokens: str = "128"
    batch: str = "1"
    depth: int = bench_model.DEPTH
    repeats: int = 5
    warm_ups: int = 1
    random_tokens: bool = False
    prompt_file: Path | None = None
    output: str = "table"

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--repeats", self.repeats, 1), ("--warm-up", self.warm_ups, 0), ("--depth", self.depth, 1),
        ):  # fmt: skip
            if value < least:
                raise OptionError(f"{flag} {value} is out of bounds: it must be at least {least}")
        if self.output not in OUTPUTS:
            raise OptionError(f"--output {self.output} is not one of {', '.join(OUTPUTS)}")
        if self.random_tokens and self.prompt_file is not None:
            raise OptionError("--random-tokens and --prompt-file exclude each other: give one")
        if not self.tests():
            raise OptionError(f"--prompt-tokens {_NONE} and --new-tokens {_NONE} leave no test: give numbers to one")

    def tests(self) -> list[Test]:
        """Prompts first, then generation; each with every batch."""
        batches = parse_counts(self.batch, "--batch", optional=False)
        prompts = parse_counts(self.prompt_tokens, "--prompt-tokens")
        steps = parse_counts(self.new_tokens, "--new-tokens")
        tests = [Test(count, 0, batch) for count in prompts for batch in batches]
        tests += [Test(self.depth, count, batch) for count in steps for batch in batches]
        return list(dict.fromkeys(tests))


def chosen_output(output: str, as_json: bool) -> str:
    """--json is short for --output json. Raises OptionError where both are given."""
    if as_json and output not in ("table", "json"):
        raise OptionError(f"--json and --output {output} exclude each other: give one")
    return "json" if as_json else output


def parse_counts(text: str, flag: str, *, optional: bool = True) -> list[int]:
    """'1,16' -> [1, 16]; 'none' -> [], if that may be. Raises OptionError."""
    if optional and text.strip().lower() == _NONE:
        return []
    found = []
    for part in text.split(","):
        if not re.fullmatch(r"\s*\d{1,7}\s*", part, re.ASCII) or not int(part):
            rest = f", or {_NONE}" if optional else ""
            raise OptionError(
                f"{flag} {text}: {part.strip()!r} is no number from 1 to 9999999; write it like 1,16{rest}"
            )
        found.append(int(part))
    return found


def bench(options: ModelOptions, wishes: BenchWishes) -> int:
    """Load, measure and print. After Ctrl-C what there is, and 130.

    Raises as `load` does for what is wrong with the model, OptionError for tests that do not fit in its context.
    """
    tests = wishes.tests()
    folder = find_folder(options)
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        require_experts(folder)
        raise CheckpointError(
            f"{folder} has no weights (*.safetensors), and bench runs the model: put them there; moe-offload plan "
            "tells from config.json alone how fast it will be"
        )
    import_libraries(options)
    config = read_config(folder)
    for test in tests:
        require_context(test, max_context(config))
    spec = MoeSpec.from_hf(config)
    tokens = _tokens(wishes, folder, config)
    nobody: Any = None  # needs the tokenizer
    model, _ = OpenedModel(options, folder, config, nobody).load()
    engine: Any = model.offload
    with engine, RunProgress(tests, enabled=options.show_progress) as progress:
        runner = ModelBench(
            model, tokens, wishes.repeats, warm_ups=wishes.warm_ups, limit_mib=bench_model.LIMIT_MIB, report=progress
        )
        random = isinstance(tokens, RandomTokens)
        facts = Facts.of(
            options.name, spec, runner, tokens.description, random=random, repeats=wishes.repeats, warm=wishes.warm_ups
        )
        try:
            runner.run(tests)
        except KeyboardInterrupt:
            progress.end()
            terminal.note("stopped early: fewer repeats, and no row for what had none")
            _print(wishes.output, facts, runner, complete=False)
            return _INTERRUPTED
        except MoeOffloadError:
            progress.end()
            _print(wishes.output, facts, runner, complete=False)
            raise
        progress.end()
        _print(wishes.output, facts, runner, complete=True)
    return 0


def _tokens(wishes: BenchWishes, folder: Path, config: PreTrainedConfig) -> Tokens:
    if wishes.random_tokens:
        return RandomTokens(config)
    try:
        tokenizer = read_tokenizer(folder)
    except CheckpointError as error:
        if wishes.prompt_file is not None:
            raise
        terminal.note(f"random tokens are taken, which route unrealistically: {error}")
        return RandomTokens(config)
    if wishes.prompt_file is None:
        return standard_library(tokenizer, config)
    text = cli_options.read_file(wishes.prompt_file)
    if not text.strip():
        raise OptionError(f"--prompt-file {wishes.prompt_file} is empty: give it some text")
    return RealText(tokenizer, config, [lambda: text], f"text of {wishes.prompt_file.name}")


def _print(output: str, facts: Facts, runner: ModelBench, *, complete: bool) -> None:
    results = runner.results()
    if output != "table":
        terminal.write(written(output, facts, results, complete=complete))
    elif results:
        print_results(facts, results)
