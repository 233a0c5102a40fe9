"""A row of any kind to examples, with one tokenizer."""

from __future__ import annotations

from tune.data.formats import AnyRow
from tune.data.mask import ChatEncoder, Example, Tokenizer, encode_text
from tune.data.pairs import encode_preference
from tune.data.preferences import PreferenceRow
from tune.data.rows import TextRow

NO_LIMIT = 1 << 40


class RowEncoder:
    """Text rows need no chat template, so a base without one is refused only when a chat comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._chats: ChatEncoder | None = None

    def encode(self, row: AnyRow, *, window_tokens: int = NO_LIMIT) -> list[Example]:
        """One example or more; of a preference row two, the preferred answer first.

        ``window_tokens`` is where texts are cut into windows; chats are not cut here.

        Raises:
            InvalidRequestError: a chat, and a base without chat template.
            RowFault: the chat template cannot render the row as serving would.
        """
        if isinstance(row, TextRow):
            return encode_text(self._tokenizer, row, window_tokens)
        if self._chats is None:
            self._chats = ChatEncoder(self._tokenizer)
        if isinstance(row, PreferenceRow):
            pair = encode_preference(self._chats, row)
            return [pair.chosen, pair.rejected]
        return self._chats.encode(row)
