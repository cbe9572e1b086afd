"""Does a passage cost the same time, and the run the same memory, however large the corpus is?

    python benchmarks/growth.py [--quick]

A BEIR folder is read into the store, encoded and searched: the corpus, encode and retrieve stages on Ray (a
tiny random encoder, exact dense search, one worker, always as many queries) on growing corpora, each with a
driver and a cluster of its own. Marginal time per passage is (seconds - seconds of the start-up corpus) /
(passages - its passages); memory is the peak of the driver and all of Ray's processes above what they held
before the stages began. ``ratio`` is the marginal
time at the second size over that at the largest: 1 when growth is linear. ``memory_ratio`` is peak memory at
the largest over that at the second. ``equal``: every passage was read and encoded, every query
was searched. ``by_stage`` has each stage's seconds and peak above its own start.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from made import context, log_queries, start_ray, tiny_encoder
from measure import PeakMemory, in_process, parser, report
from texts import query_texts

from retrieval_ray.config import DatasetConfig
from retrieval_ray.sources import open_source
from retrieval_ray.stages import encode, ingest, retrieve
from retrieval_ray.stages.collection import Collection

HIDDEN, WORDS = 64, 12
_LETTERS = str.maketrans("0123456789", "abcdefghij")
Figures = dict[str, float]  # seconds; MiB of private memory, and with mapped pages


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", help="passages, the first for start-up, as 1000,10000,100000")
    arguments.add_argument("--one", type=int, help="this size alone, once: its figures and nothing else")
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(_one(given.one, 256 if given.quick else 1024)))
        return
    chosen = given.sizes or ("512,2048,8192" if given.quick else "1000,10000,100000,1000000")
    sizes = [int(size) for size in chosen.split(",")]
    rounds = {size: 1 if given.quick or size > 50_000 else 3 for size in sizes}
    quick = ["--quick"] if given.quick else []
    runs = {
        size: [in_process(__file__, ["--one", str(size), *quick]) for _ in range(rounds[size])]
        for size in sizes
    }

    def median(stage: str, figure: str) -> dict[int, float]:
        return {size: round(statistics.median(run[stage][figure] for run in runs[size]), 3) for size in sizes}

    seconds, private = median("all", "seconds"), median("all", "private")
    first, second, last = sizes[0], sizes[1], sizes[-1]
    marginal = {
        size: 1e6 * (seconds[size] - seconds[first]) / (size - first) for size in sizes if size != first
    }
    report(
        "growth",
        quick=given.quick,
        ratio=marginal[second] / marginal[last],
        ours=marginal[last],
        peer=marginal[second],
        unit="microseconds per further passage",
        equal=all(run["all"]["whole"] for found in runs.values() for run in found),
        memory_ratio=private[last] / private[second],
        marginal=marginal,
        seconds=seconds,
        peak_mib=private,
        peak_mib_with_mapped=median("all", "mapped"),
        by_stage={
            stage: {"seconds": median(stage, "seconds"), "peak_mib": median(stage, "private")}
            for stage in ("corpus", "encode", "retrieve")
        },
        queries=runs[last][0]["all"]["queries"],
        words=WORDS,
        hidden=HIDDEN,
    )


def _one(size: int, queries: int) -> dict[str, Figures]:
    """The figures of every stage and of all of them, on a corpus of that size."""
    with tempfile.TemporaryDirectory() as folder:
        encoder = tiny_encoder(folder, hidden=HIDDEN)
        start_ray()
        return _run(folder, encoder, size, [f"{n} {text}" for n, text in enumerate(query_texts(queries))])


def _run(folder: str, encoder: str, size: int, queries: list[str]) -> dict[str, Figures]:
    run = context(f"{folder}/store", encoder, workers=1, threads=1, precision="float32", budget=4096)
    run.config.retrieve.retrievers = ["dense"]
    given = Path(folder, "growing")
    given.mkdir(parents=True)
    with (given / "corpus.jsonl").open("w") as lines:
        for n, text in enumerate(islice(_texts(queries), size)):
            lines.write(json.dumps({"_id": f"p{n}", "title": "", "text": text}) + "\n")
    made: Any = Collection("growing", "test", 1, None, None, log_queries(run, "growing", queries))
    dataset = DatasetConfig(path=str(given), titles=False)
    work: dict[str, Callable[[], Any]] = {
        "corpus": lambda: replace(made, corpus=ingest.run(run, dataset, open_source(dataset.path))),
        "encode": lambda: encode.run(run, made),
        "retrieve": lambda: retrieve.run(run, made, ["dense"]),
    }
    found: dict[str, Figures] = {}
    peaks: list[PeakMemory] = []
    for stage, do in work.items():
        begun = time.perf_counter()
        with PeakMemory() as peak:
            made = do()
        found[stage] = {"seconds": time.perf_counter() - begun, "private": peak.megabytes}
        peaks.append(peak)
    grown = [peak.before - peaks[0].before for peak in peaks]  # what a stage leaves counts for the next
    found["all"] = {
        "seconds": sum(figures["seconds"] for figures in found.values()),
        "private": max(peak.megabytes + more for peak, more in zip(peaks, grown, strict=True)),
        "mapped": max(peak.with_mapped for peak in peaks),
        "whole": [made.corpus.manifest()["rows"], made.passages.manifest()["rows"]] == [size, size]
        and made.retrieved.manifest()["rows"] == len(queries),
        "queries": len(queries),
    }
    return found


def _texts(queries: list[str]) -> Iterator[str]:
    """Without end, all different (to near-duplicates too), about ``WORDS`` words each."""
    words = " ".join(queries).split()
    number = 0
    while True:
        at = 7 * number % (len(words) - WORDS)
        yield f"{number:09}".translate(_LETTERS) + " " + " ".join(words[at : at + WORDS])
        number += 1


if __name__ == "__main__":
    main()
