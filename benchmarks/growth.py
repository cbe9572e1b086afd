"""Does a passage cost the same time, and the run the same memory, however large the corpus is?

    python benchmarks/growth.py [--quick]

The encode and retrieve stages on Ray (a tiny random encoder, exact dense search, one worker, always as many
queries) on growing corpora. Marginal time per passage is (seconds - seconds of the start-up corpus) /
(passages - its passages); memory is the peak of the driver and all of Ray's processes above what they held
before the stages began. ``ratio`` is the marginal time at the second size over that at the largest: 1 when
growth is linear. ``memory_ratio`` is peak memory at the largest over that at the second.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from made import collection, context, start_ray, tiny_encoder
from measure import PeakMemory, parser, report, seconds_of
from texts import query_texts

from retrieval_ray.stages import encode, retrieve

HIDDEN, WORDS = 64, 12


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", help="passages, the first for start-up, as 1000,10000,100000")
    given = arguments.parse_args()
    chosen = given.sizes or ("512,2048,8192" if given.quick else "1000,10000,100000,1000000")
    sizes = [int(size) for size in chosen.split(",")]
    rounds = {size: 1 if given.quick or size > 50_000 else 3 for size in sizes}
    seconds, memory, private = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        encoder = tiny_encoder(folder, hidden=HIDDEN)
        queries = [f"{n} {text}" for n, text in enumerate(query_texts(256 if given.quick else 1024))]
        start_ray()
        for size in sizes:
            measured = [_run(f"{folder}/{size}-{n}", encoder, size, queries) for n in range(rounds[size])]
            seconds[size] = statistics.median(run[0] for run in measured)
            private[size] = statistics.median(run[1] for run in measured)
            memory[size] = statistics.median(run[2] for run in measured)
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
        equal=True,
        memory_ratio=private[last] / private[second],
        marginal=marginal,
        seconds=seconds,
        peak_mib=private,
        peak_mib_with_mapped=memory,
        queries=len(queries),
        words=WORDS,
        hidden=HIDDEN,
    )


def _run(folder: str, encoder: str, size: int, queries: list[str]) -> tuple[float, float, float]:
    """Seconds, private MiB and MiB with mapped pages of both stages on a corpus of that size."""
    run = context(folder, encoder, workers=1, threads=1, precision="float32", budget=4096)
    run.config.retrieve.retrievers = ["dense"]
    Path(folder).mkdir()
    made = collection(run, "growing", _texts(queries), size, queries)
    with PeakMemory() as peak:
        seconds = seconds_of(lambda: retrieve.run(run, encode.run(run, made), ["dense"]))
    return seconds, peak.megabytes, peak.with_mapped


def _texts(queries: list[str]) -> Iterator[str]:
    """Without end, all different, about ``WORDS`` words each."""
    words = " ".join(queries).split()
    number = 0
    while True:
        at = 7 * number % (len(words) - WORDS)
        yield f"{number} " + " ".join(words[at : at + WORDS])
        number += 1


if __name__ == "__main__":
    main()
