"""Text appears as it becomes certain, and all pieces together are the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe_offload.progress import _pace
from moe_offload.streaming import TextDecoder
from tests import cli_model

BYTES = cli_model.make_tokenizer()


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], before: list[int]) -> list[str]:
    decoder = TextDecoder(tokenizer, before)
    return [*(decoder.add(token) for token in ids), decoder.rest()]


@settings(deadline=None)
@given(st.text(max_size=30))
def test_pieces_make_the_text(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert "".join(pieces(BYTES, ids, [])) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=40))
def test_pieces_make_what_decode_makes(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids, [])) == BYTES.decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=12), st.text(max_size=12))
def test_text_before_is_not_repeated(before: str, text: str) -> None:
    known = BYTES(before)["input_ids"]
    assert "".join(pieces(BYTES, BYTES(text)["input_ids"], known)) == text


def test_half_a_character_is_held_back() -> None:
    ids = BYTES("a€b")["input_ids"]
    assert pieces(BYTES, ids, []) == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end_is_shown() -> None:
    ids = BYTES("a€")["input_ids"][:-1]
    assert pieces(BYTES, ids, []) == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize(("before", "expected"), [([], "Hello"), ([1], " Hello")])
def test_space_between_words_depends_on_what_stands_before(before: list[int], expected: str) -> None:
    """SentencePiece writes a space in front of a word, but not at the beginning of a text."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581Well": 1, "\u2581Hello": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert "".join(pieces(tokenizer, [2], before)) == expected


def test_pace_of_work() -> None:
    assert _pace(250, 1000, "tokens", 2.0) == "250/1000 tokens, 125/s, 6 s left"
    assert _pace(0, 4, "kernels", 0.5) == "0/4 kernels"
    assert _pace(0, None, "", 1.0) == ""
