"""A base's tokenizer, without its weights. transformers is imported when one is asked for, and brings torch along."""

from __future__ import annotations

from pathlib import Path

from tune.data.mask import Tokenizer


def load_tokenizer(base_dir: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_dir, local_files_only=True)


def context_tokens(base_dir: Path) -> int | None:
    """The longest sequence the base was made for; ``None`` where its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_dir, local_files_only=True).get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length is not None else None
