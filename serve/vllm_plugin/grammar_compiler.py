"""xgrammar compilers that are replaced now and then, because one keeps memory of every grammar it has seen.

xgrammar 0.2.8 holds 11 to 14 KB of each grammar beyond its cache, whatever limit that has: 15,000 small JSON schemas
took 326 MiB with 93 MiB in the cache (limit 128), which only the compiler's end gave back. Clients that make up a
schema for each request would grow an engine for ever. With a new compiler every 500 grammars 12,000 took 36 MiB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import xgrammar

MOST_GRAMMARS = 500
"""Different ones for each compiler. What is in use goes on; the others are compiled again when they come back."""


class Renewal:
    """What one backend has compiled since its compiler was new. Compiling threads share it."""

    def __init__(self, most_grammars: int = MOST_GRAMMARS) -> None:
        self._most_grammars = most_grammars
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def is_due(self, *grammar: object) -> bool:
        """Whether this grammar needs a new compiler; counts it."""
        with self._lock:
            is_due = len(self._seen) >= self._most_grammars and hash(grammar) not in self._seen
            if is_due:
                self._seen.clear()
            self._seen.add(hash(grammar))
            return is_due


def use(backend: Any, most_grammars: int = MOST_GRAMMARS) -> None:
    """Have vLLM's ``XgrammarBackend``, or a class of its form, renew its ``compiler``. Not to be called twice."""
    compile_grammar: Callable[..., Any] = backend.compile_grammar

    def compile_with_a_fresh_compiler(self: Any, request_type: object, grammar: str, *rest: Any, **named: Any) -> Any:
        renewal = self.__dict__.setdefault("capo_renewal", Renewal(most_grammars))
        if renewal.is_due(request_type, grammar):
            self.compiler = _renewed(self.compiler)
        return compile_grammar(self, request_type, grammar, *rest, **named)

    backend.compile_grammar = compile_with_a_fresh_compiler


def _renewed(compiler: xgrammar.GrammarCompiler) -> xgrammar.GrammarCompiler:
    tokenizer_info = compiler.compile_regex("a").tokenizer_info  # of a grammar: a compiler does not tell its own
    return xgrammar.GrammarCompiler(tokenizer_info, cache_limit_bytes=compiler.cache_limit_bytes)
