"""The demo model: small enough to ship, loaded by plain transformers, and really trained."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo_model.corpus import is_held_out, render

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "demo"
# sched.py of CPython 3.11, a file that the training never saw (PSF-2.0)
HELD_OUT = ROOT / "tests" / "data" / "held_out_sched.txt"
MAX_LOSS = 3.15  # nats per token: the model has 3.06 here, the 5-gram model of ngram.py 4.18

TOKENIZER: Any = AutoTokenizer.from_pretrained(FOLDER)
messages = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant"]),
        st.text(),
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(FOLDER, experts_implementation="eager")
    return loaded.eval()


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    text = TOKENIZER.bos_token + HELD_OUT.read_text(encoding="utf-8")
    encoded = TOKENIZER(text, add_special_tokens=False, truncation=True, return_tensors="pt")
    tokens: torch.Tensor = encoded["input_ids"]
    return tokens


def test_folder_fits_in_a_package() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16_000_000


def test_config_is_a_small_qwen3_moe() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_hidden_layers"] >= 6 and config["mlp_only_layers"] == []
    assert config["decoder_sparse_step"] == 1
    assert config["num_experts"] >= 8 and config["num_experts_per_tok"] >= 2
    assert config["max_position_embeddings"] >= 1024
    assert config["hidden_size"] % 32 == config["moe_intermediate_size"] % 32 == 0


def test_parameters_are_bfloat16_and_few(model: Any) -> None:
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert 5_000_000 <= model.num_parameters() <= 10_000_000


@given(st.text())
@settings(deadline=None)
def test_tokenizer_keeps_any_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


@given(messages, messages)
@settings(deadline=None)
def test_chat_turns_only_append(history: list[dict[str, str]], rest: list[dict[str, str]]) -> None:
    """What was rendered and computed for earlier turns stays valid, token by token."""
    before = TOKENIZER.apply_chat_template(history, tokenize=False)
    after = TOKENIZER.apply_chat_template(history + rest, tokenize=False)
    assert after.startswith(before)


@given(messages, st.text())
@settings(deadline=None)
def test_reply_continues_the_generation_prompt(history: list[dict[str, str]], reply: str) -> None:
    """Tokens of prompt, reply and end are the beginning of the next turn's tokens."""
    prompt = _chat_ids(history, add_generation_prompt=True)
    answer = TOKENIZER(reply, add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id]
    replied = [*history, {"role": "assistant", "content": reply}]
    asked = [*replied, {"role": "user", "content": "Close the file."}]
    following = _chat_ids(asked, add_generation_prompt=True)
    assert following[: len(prompt) + len(answer)] == prompt + answer


def test_training_saw_what_the_template_renders() -> None:
    turns = [
        {"role": "system", "content": "Tools for files."},
        {"role": "user", "content": "Close the file."},
        {"role": "assistant", "content": "def close(self):\n    self.file.close()"},
        {"role": "user", "content": "Open it."},
    ]
    assert TOKENIZER.apply_chat_template(turns, tokenize=False) == render(turns)


def test_unknown_role_is_refused() -> None:
    with pytest.raises(Exception, match="role must be system, user or assistant"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


@torch.no_grad()
def test_held_out_loss_beats_the_5_gram(model: Any, held_out: torch.Tensor) -> None:
    assert is_held_out("sched.py")
    assert model(held_out, labels=held_out).loss.item() < MAX_LOSS


@torch.no_grad()
def test_routing_uses_all_experts_and_depends_on_the_token(model: Any, held_out: torch.Tensor) -> None:
    experts = model.config.num_experts
    output = model(held_out, output_router_logits=True)
    for logits in output.router_logits:
        probabilities = logits.float().softmax(-1)  # [T, E]
        chosen = probabilities.topk(model.config.num_experts_per_tok, -1).indices
        share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        entropy = -(share * share.clamp_min(1e-9).log()).sum().item()
        assert entropy > 0.8 * math.log(experts)
        assert share.max() < 0.3
        assert probabilities.max(-1).values.mean() > 2 / experts


def test_a_chat_reply_is_a_function(model: Any) -> None:
    asked = [{"role": "user", "content": "Return the size of a file in bytes."}]
    prompt = torch.tensor([_chat_ids(asked, add_generation_prompt=True)])
    mask = torch.ones_like(prompt)
    output = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=24)
    reply = TOKENIZER.decode(output[0, prompt.shape[1] :])
    assert reply.lstrip().startswith(("def ", "@"))


def _chat_ids(history: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
    text = TOKENIZER.apply_chat_template(history, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids
