"""Train the demo model on the standard library and write it to models/demo.

    python -m benchmarks.demo_model.train --work-dir /tmp/demo

A run may be killed at any time: it goes on from the last checkpoint in --work-dir.
The learning rate follows progress, which is the larger of steps done / --steps and time used /
--budget-minutes, so that it reaches zero when the time is up however slow the machine was.
A finished run goes on when started again with more steps or minutes.
"""

import json
import math
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.demo_model.batches import Batches, encode_all
from benchmarks.demo_model.corpus import BOS, EOS, USER, load_corpus
from benchmarks.demo_model.tokenizer import load_tokenizer, train_tokenizer
from benchmarks.demo_model.training import Recipe, Training, held_out_loss

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "models" / "demo"
LOG_EVERY, SAVE_EVERY, CHECK_EVERY = 25, 50, 250


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen3MoeConfig.from_dict(sizes)


def export(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder, each file renamed into place when complete."""
    beside = folder.parent / f".{folder.name}.tmp"
    beside.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    make: Any = GenerationConfig
    model.generation_config = make(
        bos_token_id=tokenizer.bos_token_id,
        # a new question ends a reply as well as the end of a file does
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(USER)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.2,  # at 1.05 half of the samples end in a loop
    )
    model.to(torch.bfloat16).save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    # older readers know the experts' number and the tokenizer's class by these names only
    _edit(beside / "config.json", num_experts=model.config.num_experts)
    _edit(
        beside / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        is_local=None,
        local_files_only=None,
    )
    for file in beside.iterdir():
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    beside.rmdir()


def _edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in sorted(values.items()) if value is not None}
    file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def main(
    work_dir: Annotated[Path, typer.Option(help="checkpoints and the log go here")],
    out: Annotated[Path, typer.Option(help="the model folder to write")] = MODEL_FOLDER,
    steps: Annotated[int, typer.Option(help="steps of 4096 tokens")] = 4600,
    budget_minutes: Annotated[float, typer.Option(help="end by then, decayed")] = math.inf,
    compiled: Annotated[bool, typer.Option(help="torch.compile, 1.5 times as fast")] = True,
) -> None:
    """Train, log, and export."""
    began = time.monotonic()  # reading and encoding count, so that the end is where the clock says
    work_dir.mkdir(parents=True, exist_ok=True)
    recipe = Recipe()
    torch.manual_seed(recipe.seed)

    def log(line: str) -> None:
        typer.echo(line)
        with (work_dir / "train.log").open("a") as file:
            file.write(line + "\n")

    corpus = load_corpus()
    if not (work_dir / "tokenizer" / "tokenizer.json").is_file():
        train_tokenizer(corpus).save_pretrained(work_dir / "tokenizer")
    tokenizer = load_tokenizer(work_dir / "tokenizer")
    batches = Batches(corpus, tokenizer, recipe.seed, recipe.tokens_per_step, recipe.chat_share)
    held_out = encode_all(tokenizer, (BOS + document.text + EOS for document in corpus.held_out))
    model: Any = Qwen3MoeForCausalLM(model_config(tokenizer)).train()
    model.set_experts_implementation("grouped_mm")
    training = Training(model, recipe, compiled)
    checkpoint = work_dir / "checkpoint.pt"
    if checkpoint.is_file():
        training.load(checkpoint)
        log(
            f"resumed at step {training.steps_done}, {training.seconds_used / 60:.1f} minutes used; "
            f"recipe {asdict(recipe)}, steps at most {steps}, minutes {budget_minutes}"
        )
    else:
        log(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        log(f"recipe {asdict(recipe)}, steps at most {steps}, minutes {budget_minutes}")
        log(
            f"{model.num_parameters():,} parameters; files {len(corpus.train)} train, "
            f"{len(corpus.held_out)} held out, {len(corpus.dropped)} dropped; tokens "
            f"{len(batches.files.stream):,} train, {len(batches.chats.stream):,} conversations, "
            f"{len(held_out):,} held out"
        )

    interrupted: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: interrupted.append(number))
    began -= training.seconds_used
    spell_began, seen = time.monotonic(), torch.zeros(0, 2)
    while True:
        step = training.steps_done
        training.seconds_used = time.monotonic() - began
        progress = max(step / steps, training.seconds_used / 60 / budget_minutes)
        if progress >= 1 or interrupted or step % SAVE_EVERY == SAVE_EVERY - 1:
            training.save(checkpoint)
        if interrupted:
            log(f"stopped at step {step}; the same command goes on from here")
            raise typer.Exit(130)
        if progress >= 1:
            break
        size = recipe.window if progress < recipe.long_from else recipe.long_window
        lr = recipe.next_lr(training.lr, progress)
        seen = torch.cat([seen, training.step(*batches.at(step, size), lr)[None]])
        step = training.steps_done
        if step % LOG_EVERY == 0:
            rate = len(seen) * recipe.tokens_per_step / (time.monotonic() - spell_began)
            loss, balance = seen.mean(0).tolist()
            eta = training.seconds_used / max(progress, 1e-6) * (1 - progress) / 60
            log(
                f"step {step} progress {progress:.3f} window {size} loss {loss:.3f} "
                f"balance {balance:.3f} lr {lr:.2e} {rate:.0f} tokens/s, "
                f"{torch.get_num_threads()} threads, eta {eta:.0f} min"
            )
            spell_began, seen = time.monotonic(), torch.zeros(0, 2)
        if step % CHECK_EVERY == 0:
            log(f"step {step} held-out {held_out_loss(model, held_out, 32, 512):.4f}")
            spell_began = time.monotonic()

    log(
        f"done: {training.steps_done} steps, "
        f"{training.steps_done * recipe.tokens_per_step:,} tokens, "
        f"{training.seconds_used / 60:.1f} min, "
        f"held-out {held_out_loss(model, held_out, 64, 1024):.4f} on 64 windows of 1024"
    )
    export(model, tokenizer, out)
    log("model written")


if __name__ == "__main__":
    typer.run(main)
