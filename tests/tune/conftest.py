"""A throw-away base model for the training tests: 2 layers, hidden 64, random weights, byte-level BPE, ChatML.

Heavy imports stay inside the fixtures, because the tests below ``jobs/`` share this file and need none of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tune.samples import CHATML, SPECIAL_TOKENS, chat_rows, text_rows, write_jsonl

if TYPE_CHECKING:
    from tests.tune.workshop import Workshop


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Builds a fast tokenizer with a given chat template; the vocabulary (512 tokens) is shared."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = [row["text"] for row in text_rows(60)] + [json.dumps(row) for row in chat_rows(60)]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    definition = core.to_str()

    def make(chat_template: str | None = CHATML, eos: str = "<|im_end|>", bos: str | None = None) -> Any:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(definition),
            eos_token=eos,
            bos_token=bos,
            pad_token="<|endoftext|>",
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model directory; nobody writes to it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("models") / "tiny-base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def workshop(tmp_path: Path, base_dir: Path) -> Workshop:
    from registry import Registry
    from tests.tune.workshop import Workshop

    write_jsonl(tmp_path / "chat.jsonl", chat_rows(40))
    write_jsonl(tmp_path / "text.jsonl", text_rows(40))
    return Workshop(tmp_path, base_dir, Registry(tmp_path / "registry"))
