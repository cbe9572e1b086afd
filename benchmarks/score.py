"""How fast does a cross-encoder judge pairs, against sentence-transformers' ``CrossEncoder.predict``?

    python benchmarks/score.py [--quick] [--data FOLDER] [--model NAME]

The model is of MiniLM's size (the bundled weights, with a random head) unless one is named; the pairs are
made of random words in SciFact's lengths, or come from a BEIR folder (each query with passages at random).
Equal scores are shown first; runs are interleaved and medians compared, once against the peer's default
(float32) and once at our precision. The last line is one JSON object; without ``--quick`` it is also
written to benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from retrieval_ray.model_files import resolve_model
from retrieval_ray.sources import open_source
from retrieval_ray.student import probe_precision
from retrieval_ray.teachers.cross_encoder import CrossEncoder

# SciFact's lengths in MiniLM's tokens: every twentieth of its queries and passages (title and text)
QUERY_TOKENS = [5, 10, 12, 13, 14, 15, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26, 29, 32, 36, 77]
PASSAGE_TOKENS = [
    78, 154, 187, 212, 228, 245, 259, 270, 283, 296, 311, 330, 348, 365, 385, 404, 430, 459, 494, 559, 1917,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and rounds")
    parser.add_argument("--data", help="a BEIR folder instead of made texts")
    parser.add_argument("--model", help="a cross-encoder: folder or hub id")
    parser.add_argument("--pairs", type=int, help="how many (default: 1200, quick 100)")
    parser.add_argument("--token-budget", type=int, default=16_384)
    options = parser.parse_args()
    count = options.pairs or (100 if options.quick else 1200)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _minilm(folder)
        queries, passages = _beir(options.data, count) if options.data else _made(count, model)
        result = compare(model, queries, passages, options)
    if not options.quick:
        target = Path(__file__).parent / "results" / "score.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def compare(
    model: str, queries: list[str], passages: list[str], options: argparse.Namespace
) -> dict[str, object]:
    from sentence_transformers import CrossEncoder as Peer

    precision = probe_precision()
    arguments = {"max_tokens": 512, "token_budget": options.token_budget}
    ours = CrossEncoder(model, precision=precision, **arguments)
    peer = Peer(resolve_model(model, "--model"), max_length=512, device=str(ours.device))
    pairs = list(zip(queries, passages, strict=True))

    def predicted(reduced: bool) -> np.ndarray:
        with torch.autocast(ours.device.type, torch.bfloat16, reduced):
            scores = peer.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return np.asarray(scores)

    every = slice(0, None, 10)  # in float32 a tenth of the pairs will do
    exact = CrossEncoder(model, precision="float32", **arguments).score(queries[every], passages[every])
    expected = predicted(False)
    reduced = ours.score(queries, passages)
    facts = {
        "worst_difference_float32": float(np.abs(exact - expected[every]).max()),
        "cosine_at_precision": _cosine(reduced, expected),
        "spread": float(expected.std()),
    }
    equal = facts["worst_difference_float32"] < 1e-3 and facts["cosine_at_precision"] > 0.999

    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.score(queries, passages),
        "default": lambda: predicted(False),
    }
    if precision != "float32" and not options.quick:
        runs["same"] = lambda: predicted(True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3 if options.quick else 5):
        for name, run in runs.items():
            seconds[name].append(_timed(run))
    rates = {name: len(pairs) / statistics.median(values) for name, values in seconds.items()}
    same = rates.get("same", rates["default"] if precision == "float32" else None)
    return {
        "benchmark": "score",
        "ratio": round(rates["ours"] / rates["default"], 3),
        "ours": round(rates["ours"], 2),
        "peer": round(rates["default"], 2),
        "unit": "pairs/s",
        "equal": bool(equal),
        "peer_is": "CrossEncoder.predict, float32, batches of 32",
        "ratio_at_same_precision": None if same is None else round(rates["ours"] / same, 3),
        "precision": precision,
        **{key: round(value, 6) for key, value in facts.items()},
        "pairs": len(pairs),
        "model": options.model or "MiniLM-L6 with a random head",
        "texts": options.data or "random words in SciFact's lengths",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {ours.device.type}",
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def _minilm(folder: str) -> str:
    """The bundled weights as a cross-encoder; the head is random but always the same."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    bundled = resolve_model("all-MiniLM-L6-v2", "--model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bundled, num_labels=1)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def _made(count: int, model: str) -> tuple[list[str], list[str]]:
    """Random words of one token each, in SciFact's lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model, "--model"))
    words = sorted(token for token in tokenizer.get_vocab() if token.isalpha() and token.islower())
    rng = np.random.default_rng(0)
    steps = np.linspace(0, 1, len(QUERY_TOKENS))

    def text(tokens: list[int]) -> str:
        return " ".join(rng.choice(words, int(np.interp(rng.random(), steps, tokens))))

    return [text(QUERY_TOKENS) for _ in range(count)], [text(PASSAGE_TOKENS) for _ in range(count)]


def _beir(folder: str, count: int) -> tuple[list[str], list[str]]:
    source, rng = open_source(folder), np.random.default_rng(0)
    queries = [text for _, _, text in source.queries("test")]
    passages = [f"{title} {text}".strip() for _, _, title, text in source.corpus()]
    return list(rng.choice(queries, count)), list(rng.choice(passages, count))


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of the centred scores: a common offset would hide every difference."""
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
