"""How fast does a cross-encoder judge pairs, against sentence-transformers' ``CrossEncoder.predict``?

    python benchmarks/score.py [--quick] [--data FOLDER] [--model NAME]

Ours: the teacher with the precision and the token budget that a run here would use. The peer: its default
(float32, batches of 32), and at our precision autocast and the whole model in bfloat16. The model is of
MiniLM's size (the bundled weights, a random head) unless one is named; pairs are of texts in SciFact's
lengths, or of a BEIR folder's (queries and passages at random). ``ratio`` is to the peer's default,
``ratio_at_same_precision`` to its best at our precision. Equal: in float32 scores within 1e-3, at our
precision a cosine of .999 of the scores less their mean. ``cached``: pairs per second where all are known.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, parser, report, seconds_of
from sentence_transformers import CrossEncoder as Peer
from texts import passage_texts, query_texts

from retrieval_ray.artifacts import Location
from retrieval_ray.contentcache import SCORE, ContentCache
from retrieval_ray.model_files import resolve_model
from retrieval_ray.student import default_token_budget, probe_precision
from retrieval_ray.teachers.cross_encoder import CrossEncoder

_MAX_TOKENS = 512


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", help="a folder in BEIR layout; without it, lengths like SciFact's")
    arguments.add_argument("--model", help="a cross-encoder: folder or hub id")
    arguments.add_argument("--pairs", type=int, help="how many")
    arguments.add_argument("--rounds", type=int)
    given = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = given.pairs or (20_000 if device == "cuda" else 100 if given.quick else 600)
    queries, passages = _drawn(query_texts(count, given.data)), passage_texts(count, given.data)
    pairs = list(zip(queries, passages, strict=True))
    precision, budget = probe_precision(device), default_token_budget(device)
    dtype = getattr(torch, precision)
    with tempfile.TemporaryDirectory() as folder:
        model = resolve_model(given.model, "--model") if given.model else _minilm(folder)
        ours = CrossEncoder(model, max_tokens=_MAX_TOKENS, precision=precision, token_budget=budget)
        exact = CrossEncoder(model, max_tokens=_MAX_TOKENS, precision="float32", token_budget=budget)
        plain = Peer(model, max_length=_MAX_TOKENS, device=device)
        half = Peer(
            model, max_length=_MAX_TOKENS, device=device, model_kwargs={"dtype": dtype}
        )  # fmt: skip
        cached = _cached(Path(folder), queries, passages)

    def theirs(peer: Peer, *, cast: bool = False) -> np.ndarray:
        with torch.autocast(device, dtype, cast):
            scores = peer.predict(
                pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False, convert_to_tensor=True
            )
        return np.asarray(scores.float().cpu())

    expected = theirs(plain)
    some = slice(0, None, 10)  # in float32 a tenth of the pairs will do
    difference = float(np.abs(exact.score(queries[some], passages[some]) - expected[some]).max())
    cosine = _cosine(ours.score(queries, passages), expected)
    runs = {"ours": lambda: ours.score(queries, passages), "default": lambda: theirs(plain)}
    if precision != "float32":
        runs["autocast"] = lambda: theirs(plain, cast=True)
        runs[precision] = lambda: theirs(half)
    seconds = interleaved(runs, given.rounds or (2 if given.quick else 5))
    rates = {name: count / value for name, value in seconds.items()}
    mine = rates.pop("ours")
    own = [rate for name, rate in rates.items() if (name == "default") == (precision == "float32")]
    report(
        "score",
        quick=given.quick,
        ratio=mine / rates["default"],
        ours=mine,
        peer=rates["default"],
        unit="pairs/s",
        equal=difference < 1e-3 and cosine > 0.999,
        ratio_at_same_precision=mine / max(own),
        peers=rates,
        cached=cached,
        float32_difference=difference,
        cosine=round(cosine, 6),
        spread=float(expected.std()),
        precision=precision,
        token_budget=budget,
        pairs=count,
        data=given.data and given.data.rstrip("/").rpartition("/")[2] or "lengths like SciFact's",
        model=given.model or "MiniLM-L6 with a random head",
    )


def _minilm(folder: str) -> str:
    """The bundled weights as a cross-encoder; the head is random but always the same."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bundled = resolve_model("all-MiniLM-L6-v2", "--model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bundled, num_labels=1)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    tokenizer.model_max_length = _MAX_TOKENS
    tokenizer.save_pretrained(folder)
    return folder


def _drawn(queries: list[str]) -> list[str]:
    """In another order, so that a collection's queries do not meet the passages beside them."""
    return [queries[n] for n in np.random.default_rng(0).permutation(len(queries))]


def _cached(folder: Path, queries: list[str], passages: list[str]) -> float:
    """Pairs per second that the cache finds, keys made and files read."""
    cache = ContentCache(Location.of(str(folder / "scores")), "teacher", SCORE)
    keys = [cache.key(q, p) for q, p in zip(queries, passages, strict=True)]
    cache.write(0, 1, keys, [float(n) for n in range(len(keys))])

    def read() -> None:
        known = cache.read(0, 1)
        assert all(cache.key(q, p) in known for q, p in zip(queries, passages, strict=True))

    return len(keys) / seconds_of(read)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of the centred scores: a common offset would hide every difference."""
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


if __name__ == "__main__":
    main()
