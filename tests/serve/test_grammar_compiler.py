"""Compilers of constraints are replaced after many grammars, and nobody notices."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from transformers import AutoTokenizer

from registry import locate_base_model
from serve.vllm_plugin import grammar_compiler
from serve.vllm_plugin.grammar_compiler import Renewal

LIMIT = 8 * 1024**2


class Backend:
    """What the repair needs of vLLM's XgrammarBackend."""

    def __init__(self, tokenizer_info: xgrammar.TokenizerInfo) -> None:
        self.compiler = xgrammar.GrammarCompiler(tokenizer_info, cache_limit_bytes=LIMIT)

    def compile_grammar(self, request_type: str, grammar: str) -> xgrammar.GrammarMatcher:
        assert request_type == "json"
        return xgrammar.GrammarMatcher(self.compiler.compile_json_schema(grammar, any_whitespace=False))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(locate_base_model("capo-tiny").path)


@pytest.fixture
def backend(tokenizer: Any) -> Backend:
    class Renewed(Backend):
        pass

    grammar_compiler.use(Renewed, most_grammars=10)
    return Renewed(xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer)))


def schema(number: int) -> str:
    return json.dumps({"const": f"value {number}"})


def test_a_grammar_in_use_and_those_after_it_work_across_a_renewal(backend: Backend, tokenizer: Any) -> None:
    first = backend.compiler
    running = backend.compile_grammar("json", schema(0))
    for number in range(1, 10):
        backend.compile_grammar("json", schema(number))
    assert backend.compiler is first
    full = first.get_cache_size_bytes()
    after = backend.compile_grammar("json", schema(10))
    assert backend.compiler is not first
    assert backend.compiler.cache_limit_bytes == LIMIT
    assert backend.compiler.get_cache_size_bytes() < full
    for matcher, number in ((running, 0), (after, 10)):
        for token in tokenizer.encode(json.dumps(f"value {number}"), add_special_tokens=False):
            assert matcher.accept_token(token)
        assert matcher.is_completed()


def test_grammars_that_come_back_renew_nothing(backend: Backend) -> None:
    first = backend.compiler
    for number in range(100):
        backend.compile_grammar("json", schema(number % 10))
    assert backend.compiler is first


def test_each_renewal_begins_a_new_count() -> None:
    renewal = Renewal(most_grammars=3)
    due = [number for number in range(12) if renewal.is_due("json", str(number))]
    assert due == [3, 6, 9]
