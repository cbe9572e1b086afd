"""A prompt with a query and a passage in it, in tokens: cut inside, never at its end."""

import re
from collections.abc import Sequence
from typing import Any

from retrieval_ray.errors import UserError
from retrieval_ray.teachers.pairs import shortened

_PLACE = re.compile(r"\{(query|passage|instruction)\}")
_TOGETHER = 256  # prompts that are tokenised together; where their tokens stand takes much room
_LEAST = 8  # tokens that must remain for query and passage


class Template:
    """Token rows of ``text`` with ``{query}`` and ``{passage}`` (and ``{instruction}``) filled in.

    A row of more than ``max_tokens`` loses the end of its passage, and of its query where that takes more
    than half of the room; the template itself is never cut. Special tokens are the tokenizer's own.
    ends_open: leave out those that it sets after the text, as a decoder that must go on there needs.
    Raises ``UserError`` for a template that leaves no room, and for a tokenizer that cannot tell where in
    the text a token stands.
    """

    def __init__(
        self, tokenizer: Any, text: str, *, max_tokens: int, ends_open: bool, instruction: str = ""
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError("teacher.model: its tokenizer has no fast version, which a template needs")
        self.tokenizer, self.max_tokens, self.ends_open = tokenizer, max_tokens, ends_open
        self.pieces = _PLACE.split(text)  # text, place, text, place, ... text
        self.instruction = instruction
        bos = tokenizer.bos_token
        self.special = not (bos and text.startswith(bos))  # a template that has it must not get it twice
        if len(self.rows([""], [""])[0]) > max_tokens - _LEAST:
            raise UserError(
                f"teacher.max_tokens: {max_tokens} leave no room for a query and a passage in the template"
            )

    def rows(self, queries: Sequence[str], passages: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt."""
        parts = (slice(at, at + _TOGETHER) for at in range(0, len(queries), _TOGETHER))
        return [row for part in parts for row in self._rows(queries[part], passages[part])]

    def _rows(self, queries: Sequence[str], passages: Sequence[str]) -> list[list[int]]:
        filled = [
            self._filled(*(shortened(self.tokenizer, text, self.max_tokens) for text in pair))
            for pair in zip(queries, passages, strict=True)
        ]
        tokens = self.tokenizer(
            [text for text, _ in filled],
            add_special_tokens=self.special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            self._cut(ids, offsets, special, spans)
            for ids, offsets, special, (_, spans) in zip(
                tokens["input_ids"],
                tokens["offset_mapping"],
                tokens["special_tokens_mask"],
                filled,
                strict=True,
            )
        ]

    def _filled(self, query: str, passage: str) -> tuple[str, dict[str, tuple[int, int]]]:
        """The prompt, and where query and passage stand in it."""
        values = {"query": query, "passage": passage, "instruction": self.instruction}
        text, spans = "", {}
        for at, piece in enumerate(self.pieces):
            if at % 2:
                spans[piece] = (len(text), len(text) + len(values[piece]))
                piece = values[piece]
            text += piece
        return text, spans

    def _cut(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        special: list[int],
        spans: dict[str, tuple[int, int]],
    ) -> list[int]:
        length = len(ids)
        if self.ends_open:
            while length and special[length - 1] and offsets[length - 1] == (0, 0):
                length -= 1
        over = length - self.max_tokens
        if over <= 0:
            return ids[:length]
        query, passage = (
            [at for at in range(length) if start <= offsets[at][0] < offsets[at][1] <= end]
            for start, end in (spans["query"], spans["passage"])
        )
        room = len(query) + len(passage) - over
        kept = min(len(query), max(room - len(passage), (room + 1) // 2))
        dropped = {*query[kept:], *passage[room - kept :]}
        return [ids[at] for at in range(length) if at not in dropped]
