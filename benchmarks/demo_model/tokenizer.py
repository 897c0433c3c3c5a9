"""A byte-level BPE tokenizer for Python source, with the chat template that fits it.

Line breaks and the indentation after them are one piece, so that a level of indentation costs
one token; letters and underscores stay together, so that `__init__` can become a token.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.demo_model.corpus import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    USER,
    Corpus,
)

VOCABULARY = 4096
PIECES = r"\n+ *| ?[\p{L}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+"

# A conversation is a module: the system message is its docstring, each user message asks for a
# function, each reply ends with the end of a file. Nothing depends on what follows a message, so
# the rendering of n messages is the beginning of the rendering of n + 1.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set content = message.content -%}
{%- else -%}
{%- set content = message.content | map(attribute="text") | join("\\n") -%}
{%- endif -%}
{%- if message.role == "system" -%}
{{- '\"\"\"' + content.strip("\\n") + '\"\"\"\\n' -}}
{%- elif message.role == "user" -%}
{{- "<|user|>" + content.strip("\\n") -}}
{%- elif message.role == "assistant" -%}
{{- "<|assistant|>" + content + eos_token -}}
{%- else -%}
{{- raise_exception("role must be system, user or assistant, not " + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|assistant|>" -}}
{%- endif -%}
"""


def train_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Learn the merges from the training files only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus.train), trainer)
    # A prompt is the beginning of a file; without this mark the model goes on as if deep inside of one.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    make: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        chat_template=CHAT_TEMPLATE,
    )
    return wrapped


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer
