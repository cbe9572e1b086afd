"""What all teachers share: batches cut by tokens, texts made whole, pairs that cannot be judged set apart."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_ray.batching import Indices, cut_chunks
from retrieval_ray.errors import UserError
from retrieval_ray.tokens import count_read

Scores = npt.NDArray[np.float32]
Score = Callable[[Sequence[str], Sequence[str]], Scores]  # queries, passages of equal length -> raw scores
Reason = tuple[str, str]  # reason, detail

WINDOW = 4096  # pairs that are tokenised and sorted together
_HOPELESS = 32  # pairs that failed one by one, before a model must show that it still answers
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def judge(
    score: Score,
    queries: Sequence[str],
    passages: Sequence[str],
    *,
    answered: tuple[str, str] | None = None,
) -> tuple[Scores, dict[int, Reason]]:
    """Scores of all pairs, and why those are NaN that have none, by position.

    A call that raises is halved until the pair that makes it raise stands alone (``failed``); a score that
    is no finite number counts for nothing either (``not_finite``). The halves of one size are all tried
    before smaller ones, so a model that can do nothing at all is soon known: it raises ``UserError``, as
    does whatever is the user's error for ``score`` itself. A model may also die on the way (its engine, or
    the memory that it needs), and pairs that it did not come to are no bad pairs: after so many failures
    in a row, and where the last pairs failed, it is asked again for the longest pair that it has answered,
    and raises ``UserError`` if it fails on that. answered: such a pair from before this call.
    """
    queries, passages = [whole(text) for text in queries], [whole(text) for text in passages]
    scores = np.full(len(queries), np.nan, dtype=np.float32)
    reasons: dict[int, Reason] = {}
    failing = 0  # single pairs in a row
    problem = ""

    def check_alive() -> None:
        if answered is None:
            if failing >= _HOPELESS:
                raise UserError(
                    f"teacher: none of {failing} pairs could be judged, the last because of {problem}"
                )
            return
        try:
            score([answered[0]], [answered[1]])
        except Exception as error:
            raise UserError(
                f"teacher: it answers no more; the last of {failing} pairs in a row failed because of "
                f"{problem}. Parts that were finished are kept: run the same command again and only the rest "
                "is judged"
            ) from error

    for start in range(0, len(queries), WINDOW):
        waiting = deque([range(start, min(start + WINDOW, len(queries)))])
        while waiting:
            rows = waiting.popleft()
            try:
                scores[rows.start : rows.stop] = score(
                    queries[rows.start : rows.stop], passages[rows.start : rows.stop]
                )
                failing = 0
                pairs = [*zip(queries[rows.start : rows.stop], passages[rows.start : rows.stop], strict=True)]
                answered = max(
                    [answered, *pairs] if answered else pairs, key=lambda pair: sum(map(len, pair))
                )
            except (UserError, torch.AcceleratorError):  # after the latter the device answers nothing more
                raise
            except Exception as error:  # a model may raise anything at all
                if len(rows) > 1:
                    middle = len(rows) // 2
                    waiting += [rows[:middle], rows[middle:]]
                    continue
                problem = f"{type(error).__name__}: {error}"[:300]
                reasons[rows.start] = ("failed", problem)
                failing += 1
                if failing % _HOPELESS == 0:
                    check_alive()
    if failing:
        check_alive()
    for at in np.flatnonzero(~np.isfinite(scores)).tolist():
        reasons.setdefault(at, ("not_finite", f"the model's score is {scores[at]}"))
        scores[at] = np.nan
    return scores, reasons


def in_chunks(lengths: Sequence[int], forward: Callable[[Indices], Tensor], *, token_budget: int) -> Scores:
    """``forward`` over rows sorted by length and cut by tokens; scores in the rows' own order.

    Where memory runs out, the budget is halved for the rest of this call. What was halved is forgotten
    afterwards, so that a row's batch never depends on calls before.
    """
    count_read(sum(lengths))
    found: list[tuple[Indices, Tensor]] = []
    waiting = deque(cut_chunks(lengths, token_budget))
    while waiting:
        chunk = waiting.popleft()
        try:
            found.append((chunk, forward(chunk)))
            continue
        except (RuntimeError, MemoryError) as error:
            if not _no_memory(error) or len(chunk) == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rest = np.concatenate([chunk, *waiting])
        budget = len(chunk) * lengths[chunk[0]] // 2
        waiting = deque(rest[piece] for piece in cut_chunks([lengths[i] for i in rest], budget))
    scores = np.zeros(len(lengths), dtype=np.float32)
    for chunk, values_N in found:  # only now: a GPU computes while the next chunk is made
        scores[chunk] = values_N.float().cpu().numpy()
    return scores


@contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """No graph, and the matrix products in the precision of the numeric profile."""
    reduced = precision != "float32"
    autocast = torch.autocast(device.type, getattr(torch, precision)) if reduced else nullcontext()
    with torch.inference_mode(), autocast:
        yield


def padded(
    rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """ids_NL and mask_NL of token rows, filled up with ``value`` on one side."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), value, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[n, place], mask[n, place] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def whole(text: str) -> str:
    """The text with "?" for every half of a surrogate pair, which can be neither stored nor tokenised."""
    return text.encode("utf-8", errors="replace").decode()


def shortened(tokenizer: Any, text: str, tokens: int) -> str:
    """A very long text without what is cut in any case: twice so many tokens are left.

    A tokenizer makes a pair of every piece it cuts off one text with every piece of the other (two texts of
    100,000 characters would keep it busy for hours), and places of all tokens take more room than the text.
    """
    if len(text) <= 16 * tokens:
        return text
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in found["offset_mapping"][: 2 * tokens]]
    return text[: max(ends, default=0)]


def _no_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(sign in str(error).lower() for sign in _NO_MEMORY)
