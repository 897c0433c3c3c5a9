"""A conversation: history, the cache between turns, a full context."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_offload
from moe_offload.conversation import Conversation
from moe_offload.models.errors import OptionError
from moe_offload.sampling import Sampling
from tests import cli_model

TOKENIZER = cli_model.make_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = moe_offload.load(cli_model.make_folder(tmp_path_factory.mktemp("chat") / "model"), threads=1)
    with model.offload:
        yield model


def talk(model: Any, *, reuse: bool = True, new: int = 10, **options: Any) -> Conversation:
    sampling = Sampling(greedy=True, max_new_tokens=new)
    return Conversation(model, TOKENIZER, sampling, reuse_cache=reuse, **options)


def silent(piece: str) -> None:
    pass


def ascii_answers(conversation: Conversation) -> None:
    """Have the model's words be tokenised again as they were made: bytes that are no UTF-8 are not."""
    conversation._config.suppress_tokens = [
        i
        for i in range(len(TOKENIZER))
        if i != 2 and (i < len(cli_model.SPECIAL) or not TOKENIZER.decode([i]).isascii())
    ]


def test_history_is_kept(model: Any) -> None:
    conversation = talk(model, system="be brief")
    first = conversation.ask("hello", silent)
    second = conversation.ask("and?", silent)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == first.text
    whole = cli_model.make_tokenizer().apply_chat_template(
        [{"role": "system", "content": "be brief"}, *conversation.messages[:3]],
        add_generation_prompt=True, return_dict=True,
    )["input_ids"]  # fmt: skip
    assert second.prompt_tokens == len(whole)


def test_streamed_pieces_are_the_answer(model: Any) -> None:
    pieces: list[str] = []
    generation = talk(model).ask("hello", pieces.append)
    assert "".join(pieces) == generation.text


@pytest.mark.parametrize("arch", ["qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"])
def test_cache_between_turns_changes_no_token(arch: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"sliding_window": 32} if arch == "gpt_oss" else {}
    model = moe_offload.load(cli_model.make_folder(tmp_path / arch, arch, **overrides), threads=1)
    answers = []
    with model.offload:
        for reuse in (True, False):
            conversation = talk(model, reuse=reuse)
            ascii_answers(conversation)
            answers.append([conversation.ask(text, silent) for text in ("hello you", "what?", "tell me")])
    reused, fresh = answers
    assert [g.new_ids for g in reused] == [g.new_ids for g in fresh]
    assert [g.prefill.tokens for g in fresh] == [g.prompt_tokens for g in fresh]
    if arch != "jamba":  # recurrent: starts anew each turn
        for last, each in zip(reused, reused[1:], strict=False):
            # all that the cache held of the conversation: everything but the answer's last token
            assert each.prompt_tokens - each.prefill.tokens == last.prompt_tokens + len(last.new_ids) - 1


def test_cache_is_cut_where_the_conversation_changes(model: Any) -> None:
    answers = []
    for reuse in (True, False):
        conversation = talk(model, reuse=reuse, system="one thing")
        ascii_answers(conversation)
        conversation.ask("hello there", silent)
        conversation.system = "one other thing"
        answers.append(conversation.ask("again", silent))
    reused, fresh = answers
    assert reused.new_ids == fresh.new_ids
    assert reused.prompt_tokens - reused.prefill.tokens == len("one ") + 1  # <|system|>


def test_clear_forgets(model: Any) -> None:
    conversation = talk(model)
    first = conversation.ask("hello", silent)
    conversation.ask("more", silent)
    conversation.clear()
    again = conversation.ask("hello", silent)
    assert again.new_ids == first.new_ids and again.prompt_tokens == first.prompt_tokens


def test_oldest_turns_go_when_the_context_is_full(model: Any) -> None:
    conversation = talk(model, new=20)
    dropped = 0
    for number in range(12):
        generation = conversation.ask(f"question number {number} " + "x" * 30, silent)
        dropped += conversation.dropped
        assert generation.prompt_tokens + len(generation.new_ids) <= cli_model.CONTEXT
        assert len(generation.new_ids) == 20 or generation.finish_reason == "stop"
    assert dropped > 0
    assert conversation.messages[0]["role"] == "user"
    assert conversation.messages[0]["content"].startswith("question number")
    assert len(conversation.messages) == 2 * (12 - dropped)


def test_message_too_long_changes_nothing(model: Any) -> None:
    conversation = talk(model)
    conversation.ask("hello", silent)
    before = list(conversation.messages)
    with pytest.raises(OptionError, match=r"500.*256|50\d.*256"):
        conversation.ask("x" * 500, silent)
    assert conversation.messages == before
    assert conversation.ask("and?", silent).new_ids


def test_answer_can_fill_the_rest_of_the_context(model: Any) -> None:
    generation = talk(model, new=9999).ask("x" * 200, silent)
    assert generation.prompt_tokens + len(generation.new_ids) <= cli_model.CONTEXT


@pytest.mark.parametrize("after", [0, 3])
def test_interrupt_keeps_what_was_said(model: Any, after: int) -> None:
    """Ctrl-C while the prompt is read leaves the turn out; later it keeps the partial answer."""
    conversation = talk(model, new=50)
    ascii_answers(conversation)
    seen = 0

    def press(piece: str) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            signal.raise_signal(signal.SIGINT)

    if after == 0:
        hook = model.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    generation = conversation.ask("hello", press)
    if after == 0:
        hook.remove()
        assert generation.new_ids == () and conversation.messages == []
    else:
        assert after <= len(generation.new_ids) <= after + 1
        assert conversation.messages[-1]["content"] == generation.text
    assert generation.finish_reason == "interrupted"
    fresh = talk(model, reuse=False, new=10)
    ascii_answers(fresh)
    fresh.messages = list(conversation.messages)
    conversation._max_new = 10
    assert conversation.ask("go on", silent).new_ids == fresh.ask("go on", silent).new_ids
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_same_seed_same_conversation(model: Any) -> None:
    texts = []
    for seed in (1, 1, 2):
        conversation = Conversation(model, TOKENIZER, Sampling(temperature=3.0, max_new_tokens=16))
        torch.manual_seed(seed)
        texts.append([conversation.ask(text, silent).text for text in ("hello", "more")])
    assert texts[0] == texts[1] != texts[2]
