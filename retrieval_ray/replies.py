"""An LLM's reply -> a query, cleaned; or a reason to drop it."""

from dataclasses import dataclass

from retrieval_ray.checks import in_other_script, is_copied, is_repetitive, is_too_long, no_query
from retrieval_ray.cleaning import clean, finished

REPLIES_VERSION = "replies-3"
Drop = tuple[str, str]  # reason, detail


@dataclass(frozen=True)
class Reply:
    """What came back for a request: a text, or an error that concerns this request alone."""

    query_id: str
    text: str | None
    error: str | None
    tokens_in: int
    tokens_out: int
    cut: bool = False  # at the limit of tokens, so it may lack its end
    refused: bool = False  # for what is in the request: asked again, it would be refused again


def parse(
    reply: str,
    passage: str,
    *,
    kind: str,
    language: str | None,
    max_words: int,
    max_copied: float,
    cut: bool = False,
) -> str | Drop:
    """The query in a reply, cleaned; or (reason, detail) to drop it.

    Reasons: ``empty``, ``thought`` (the reply ended within the model's thoughts), ``refusal``,
    ``preamble`` and no query after it, ``cut``, ``too_long`` (more than ``max_words`` words, or twelve
    characters for each), ``repetitive``, ``other_script`` than the language's (None: the passage's),
    ``copied``: more than the share ``max_copied`` of its words are one unbroken run of the passage's words.

    cut: the reply ended at the limit of tokens. Then its last line, or of keywords the last one, does not
    count. The first line does (the papers' code drops it, because their prompts lacked the assistant's
    header).
    """
    query = clean(reply, kind)
    reason = no_query(query)
    if cut and reason not in ("thought", "refusal"):
        query = clean(finished(reply, kind), kind)
        reason = "cut" if no_query(query) else None
    if reason:
        return reason, (query if reason in ("refusal", "preamble") else reply)[:200]
    if is_too_long(query, max_words):
        return "too_long", query[:200]
    if is_repetitive(query):
        return "repetitive", query[:200]
    if scripts := in_other_script(query, passage, language):
        return "other_script", f"{scripts}: {query[:200]}"
    if is_copied(query, passage, max_copied):
        return "copied", query[:200]
    return query
