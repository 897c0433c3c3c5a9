"""Measure the shipped demo model on the held-out files and write result.json.

    python -m benchmarks.demo_model.evaluate

Every held-out token but the first is scored once by the model and once by a 5-gram model of the
same training files; `random_experts` is the model's own loss when its router is replaced by dice,
which shows what the routing is worth.
"""

import json
import math
import os
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_model.batches import encode_all
from benchmarks.demo_model.corpus import BOS, EOS, conversations, load_corpus, render
from benchmarks.demo_model.ngram import KneserNey

HERE = Path(__file__).resolve().parent
WINDOW, STRIDE = 1024, 512
# no line break at the end: it belongs to the next token, together with the indentation
CODE_PROMPTS = [
    '"""Utilities for reading configuration files."""\n\nimport os',
    "class Queue:\n    def __init__(self, maxsize=0):",
    "def parse_args(argv=None):",
]
QUESTIONS = ["Return the size of a file in bytes.", "Close the connection."]


class RoutingRecord:
    """Which experts each layer chose, gathered by hooks on the routers."""

    def __init__(self, model: Any) -> None:
        self.chosen: list[list[Tensor]] = [[] for _ in model.model.layers]
        self._handles = [
            layer.mlp.gate.register_forward_hook(self._hook(index)) for index, layer in enumerate(model.model.layers)
        ]

    def _hook(self, layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            self.chosen[layer].append(output[2])  # [T, K]

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def usage(self, experts: int) -> list[dict[str, Any]]:
        """Per layer: the experts' shares, their entropy in units of the uniform one's, and
        how often an expert of one token serves the next token as well."""
        rows = []
        for layer, parts in enumerate(self.chosen):
            chosen = torch.cat(parts)
            share = torch.bincount(chosen.flatten(), minlength=experts).double()
            share /= share.sum()
            kept = (chosen[1:, :, None] == chosen[:-1, None, :]).any(-1).double().mean()
            entropy = -(share * share.clamp_min(1e-12).log()).sum() / math.log(experts)
            rows.append(
                {
                    "layer": layer,
                    "min_share": round(share.min().item(), 4),
                    "max_share": round(share.max().item(), 4),
                    "entropy": round(entropy.item(), 4),
                    "kept_by_next_token": round(kept.item(), 4),
                    "shares": [round(value, 4) for value in share.tolist()],
                }
            )
        return rows


@contextmanager
def random_experts(model: Any, seed: int = 0) -> Iterator[None]:
    """While inside, each token's experts are drawn at random; the weights stay the router's."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, scores, chosen = output
        noise = torch.rand(len(chosen), module.num_experts, generator=generator)
        return logits, scores, noise.topk(chosen.shape[-1]).indices

    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def token_losses(model: Any, stream: Tensor) -> Tensor:
    """The loss of every token but the first, each with 512 to 1023 tokens of history."""
    losses = torch.empty(len(stream) - 1)
    done = 0  # targets scored so far
    for start in range(0, len(stream) - 1, STRIDE):
        window = stream[start : start + WINDOW]
        logits = model(window[None, :-1], use_cache=False).logits[0].float()
        entropy = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        end = start + len(entropy)
        losses[done:end] = entropy[done - start :]
        done = end
        if done == len(losses):
            break
    return losses


def samples(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """What the sampling defaults of generation_config.json give, seeded."""
    asked = [(prompt, tokenizer.bos_token + prompt) for prompt in CODE_PROMPTS]
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        asked.append((question, prompt))
    answers = []
    for name, prompt in asked:
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=160)
        reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        answers.append({"prompt": name, "reply": reply})
    return answers


def main(
    folder: Annotated[Path, typer.Option(help="the model")] = HERE.parents[1] / "models" / "demo",
    out: Annotated[Path, typer.Option(help="where to write")] = HERE / "result.json",
    with_samples: Annotated[bool, typer.Option(help="generate text as well")] = True,
) -> None:
    """Score the model and the 5-gram, count experts, write text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
    model.eval()
    corpus = load_corpus()
    train = encode_all(tokenizer, (BOS + item.text + EOS for item in corpus.train))
    chats = encode_all(tokenizer, map(render, conversations(corpus.train)))
    held_out = encode_all(tokenizer, (BOS + item.text + EOS for item in corpus.held_out))

    ngram = {
        "training_files": -KneserNey(train, len(tokenizer)).log_probabilities(held_out).mean(),
        "training_files_and_conversations": -KneserNey(np.concatenate([train, chats]), len(tokenizer))
        .log_probabilities(held_out)
        .mean(),
    }
    typer.echo(f"5-gram: {ngram}")
    record = RoutingRecord(model)
    stream = torch.from_numpy(held_out)
    losses = token_losses(model, stream)
    record.remove()
    typer.echo(f"model: {losses.mean():.4f}")
    with random_experts(model):
        diced = token_losses(model, stream[: 32 * WINDOW])
    characters = sum(len(item.text) for item in corpus.held_out)
    result = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stdlib": f"Python {sysconfig.get_python_version()}",
        "parameters": model.num_parameters(),
        "bytes_on_disk": sum(file.stat().st_size for file in folder.iterdir()),
        "train_files": len(corpus.train),
        "train_tokens": len(train),
        "conversation_tokens": len(chats),
        "held_out_files": len(corpus.held_out),
        "held_out_tokens": len(held_out),
        "dropped_as_near_duplicates": corpus.dropped,
        "held_out_loss": {
            "model": round(losses.mean().item(), 4),
            "bits_per_character": round(losses.double().sum().item() / math.log(2) / characters, 4),
            "five_gram_kneser_ney": {name: round(float(loss), 4) for name, loss in ngram.items()},
            "model_first_32768_tokens": round(losses[: len(diced)].mean().item(), 4),
            "random_experts_first_32768_tokens": round(diced.mean().item(), 4),
        },
        "expert_usage": record.usage(model.config.num_experts),
        "samples": samples(model, tokenizer) if with_samples else [],
    }
    beside = out.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, out)


if __name__ == "__main__":
    typer.run(main)
