"""What do 10 million, 100 million and a billion passages cost, and what breaks first? Writes docs/scale.md.

    python benchmarks/scale.py [--quick | --page]

Measures the rates of the stages that hold no model (scale_measured.py) into ``results/scale.json``, takes
those of models from the other benchmarks' results, those of GPUs from data sheets, and fills
scale.template.md by the code's own formulas (scale_costs.py). ``--page`` measures nothing and writes the
page from the results that are there. ``--quick`` measures less and writes nothing. ``ratio`` is to the rates
that were written last; equal: rows take as many bytes, to a tenth.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, parser, report
from scale_costs import Case, Cost, Hardware, of_all, parts, retrieve, vector_bytes

from retrieval_ray.artifacts import AT_ONCE, MOST_BUCKETS

PAGE = RESULTS.parents[1] / "docs" / "scale.md"
SIZES = {"10 million": 10**7, "100 million": 10**8, "A billion": 10**9}
_MEASURED = {
    "ingest_us": "microseconds: read twice, sorted, near-duplicates found, written",
    "index_us": "microseconds: where a passage lies, for the pools",
    "row_us": "microseconds: a row of a shard's ranking found, written, read, merged",
    "group_us": "microseconds: a query's pool made twice and checked, a list built",
    "vector_us": "microseconds: a passage passed over while vectors are looked up",
    "text_us": "microseconds: a passage passed over while texts are looked up",
    "corpus_bytes": "bytes of a passage in the store",
    "index_bytes": "bytes of a passage in the pools' index",
    "run_bytes": "bytes of a row of a ranking",
    "pair_bytes": "bytes of a pair in the pools",
    "score_bytes": "bytes of a pair's score",
    "kept_score_bytes": "bytes of a score kept by content",
    "kept_reply_bytes": "bytes of an LLM's reply kept by content",
    "list_bytes": "bytes of a training list of 20",
    "prompt_characters": "characters of a prompt, examples and passage; four are taken for a token",
}
_SHEET, _GUESS = "NVIDIA's data sheet", "a guess"
_ASSUMED = {
    "l4_bfloat16": ("L4, bfloat16, FLOP/s", f"{_SHEET}, without sparsity"),
    "l4_float32": ("L4, float32, FLOP/s", _SHEET),
    "l4_memory": ("L4, memory, bytes/s", _SHEET),
    "a100_bfloat16": ("A100, bfloat16, FLOP/s", f"{_SHEET}, without sparsity"),
    "share": ("share of a GPU's peak that is reached", f"{_GUESS}; on two cores it is measured, below"),
    "decoded": ("replies that an engine writes at a time", f"{_GUESS}, for 16 GB of weights in 24 GB"),
    "network": ("bytes/s between a node and the store", f"{_GUESS}; EC2 says up to 1.25e9 for g6.2xlarge"),
    "answer": ("seconds until the store answers", "Amazon S3's user guide: .1 to .2 for small objects"),
    "disk": ("bytes of a node's own disk", "EC2: 450 GB for g6.2xlarge"),
    "disk_read": ("bytes/s of that disk", _GUESS),
    "cache": ("bytes of memory for files that were read", "half of the 32 GiB of g6.2xlarge"),
    "driver_memory": ("bytes of the head's memory", "EC2: 64 GiB for m7i.4xlarge"),
}
_HEAD = (
    "stage", "hours", "one process", "waiting", "GPU hours", "stored", "meanwhile", "network",
    "disk of each node", "driver's memory",
)  # fmt: skip
_IS_IN = 0.239  # seconds a part for a million wanted ids, measured on 2 CPU cores before it was mended


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--page", action="store_true", help="measure nothing; write docs/scale.md")
    given = arguments.parse_args()
    if not given.page:
        from scale_measured import measured

        written = RESULTS / "scale.json"
        before = json.loads(written.read_text())["rates"] if written.exists() else {}
        case = Case()
        passages, queries = (2048, 512) if given.quick else (16_384, 4096)
        with tempfile.TemporaryDirectory() as folder:
            rates = measured(
                folder, passages=passages, queries=queries, text_bytes=case.text_bytes, depth=case.depth
            )
        known = [key for key in _MEASURED if key in before]
        ours, peer = (sum(f[key] for key in known if key.endswith("_us")) for f in (rates, before))
        sizes = [key for key in known if key.endswith("_bytes")]
        report(
            "scale",
            quick=given.quick,
            ratio=peer / ours if known else 1.0,
            ours=ours,
            peer=peer,
            unit="microseconds, one row of each stage; the peer is results/scale.json",
            equal=all(math.isclose(rates[key], before[key], rel_tol=0.1) for key in sizes),
            rates=rates,
            passages=passages,
            queries=queries,
        )
    if not given.quick:
        PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole of docs/scale.md."""
    case, hardware, found = Case(), Hardware(), result("scale")
    rates = found["rates"]
    costs = {name: of_all(size, case, hardware, rates) for name, size in SIZES.items()}
    facts: dict[str, Any] = {
        "case": case,
        "hardware": hardware,
        "student": case.student / 1e6,
        "costs": "\n".join(_costs(name, stages) for name, stages in costs.items()),
        "limits": _limits(case, hardware),
        "held": _bytes(case.lists * case.list_size * 2.0 * case.dimension),
        **_bottlenecks(costs, case, hardware, rates),
        **{key: found["machine"][key] for key in ("cores", "processor")},
        **{key: found[key] for key in ("passages", "queries", "commit")},
        "measured": _table(["what", "measured"], [[t, f"{rates[k]:,.4g}"] for k, t in _MEASURED.items()]),
        "assumed": _table(
            ["what", "assumed", "source"],
            [[text, f"{getattr(hardware, key):.4g}", source] for key, (text, source) in _ASSUMED.items()],
        ),
        "share": result("train_step", "train_step-synthetic")["table"][0]["gemm_share"]["ours"],
        "two_cores": _two_cores(),
    }
    return Path(__file__).with_name("scale.template.md").read_text(encoding="utf-8").format(**facts)


def result(*names: str) -> dict[str, Any]:
    """A benchmark's result, the quick one where there is no other."""
    tried = [RESULTS / f"{name}{suffix}.json" for suffix in ("", "-quick") for name in names]
    found: dict[str, Any] = json.loads(next(path for path in tried if path.exists()).read_text("utf-8"))
    return found


def _costs(name: str, stages: Sequence[Cost]) -> str:
    """The table of one size."""
    rows = [
        [
            cost.stage,
            *(_hours(hours) for hours in (cost.hours, cost.driver_hours, cost.waiting_hours)),
            f"{_hours(cost.gpu_hours)} {cost.gpu}" if cost.gpu_hours else "",
            *map(_bytes, (cost.stored, cost.passing, cost.moved, cost.node_disk, cost.driver_memory)),
        ]
        for cost in stages
    ]
    gpus = {gpu: sum(c.gpu_hours for c in stages if c.gpu == gpu) for gpu in ("L4", "A100")}
    rows.append(
        [
            "**all**",
            _hours(sum(c.hours for c in stages)),
            _hours(sum(c.driver_hours for c in stages)),
            _hours(sum(c.waiting_hours for c in stages)),
            ", ".join(f"{_hours(value)} {gpu}" for gpu, value in gpus.items()),
            _bytes(sum(c.stored for c in stages)),
            _bytes(max(c.passing for c in stages)),
            _bytes(sum(c.moved for c in stages)),
            _bytes(max(c.node_disk for c in stages)),
            _bytes(max(c.driver_memory for c in stages)),
        ]
    )
    head = f"## {name} passages, in {parts(SIZES[name]):,} parts"
    return f"{head}\n\n{_table(_HEAD, rows)}\n\n{_longest(stages)}\n"


def _longest(stages: Sequence[Cost]) -> str:
    """The three stages that take longest, and what each of them mostly waits for."""
    every = sum(cost.hours for cost in stages)
    named = []
    for cost in sorted(stages, key=lambda cost: -cost.hours)[:3]:
        machines = cost.hours - cost.driver_hours - cost.waiting_hours
        kinds = {
            "its machines at work": machines,
            "one process": cost.driver_hours,
            "waiting for the store": cost.waiting_hours,
        }
        most = max(kinds, key=lambda kind: kinds[kind])
        share = f"{cost.hours / every:.0%} of the hours"
        named.append(f"{cost.stage} ({share}, {kinds[most] / cost.hours:.0%} of them {most})")
    return f"What takes longest: {', then '.join(named)}."


def _limits(case: Case, hardware: Hardware) -> str:
    """The corpora at which something does not get slow, but breaks."""
    rows = [
        (
            "copies of the vectors fill a node's disk, in exact search on an object store",
            hardware.disk / vector_bytes(case),
            "mount the store (a shared filesystem), or take larger disks",
        ),
        (
            "the driver cannot lay out the pools' index in memory (32 bytes a passage)",
            hardware.driver_memory / 32,
            "a larger head",
        ),
        (
            "the driver cannot hold the hashes of ids by which it finds repeated ones (17 bytes a passage)",
            hardware.driver_memory / 17,
            "a larger head",
        ),
        (
            "BM25's index does not fit into a worker's memory while it is built (60 words of 45 bytes)",
            2 * hardware.cache / (45 * 60),
            "leave it out: `retrieve.retrievers=[dense]`",
        ),
    ]
    ordered = sorted(rows, key=lambda row: row[1])
    return _table(["what", "passages", "then"], [[w, f"{n / 1e6:,.0f} million", t] for w, n, t in ordered])


def _bottlenecks(
    costs: Mapping[str, list[Cost]], case: Case, hardware: Hardware, rates: Mapping[str, float]
) -> dict[str, Any]:
    """The figures of the list of bottlenecks."""
    middle, largest = ({c.stage: c for c in costs[name]} for name in ("100 million", "A billion"))
    ten, hundred = SIZES["10 million"], SIZES["100 million"]
    cut, uncut = (retrieve(ten, case, hardware, rates, joined=joined) for joined in (True, False))
    uncapped = 2 ** math.ceil(math.log2(hundred / 512))
    one_by_one = uncapped * hardware.answer / 3600
    reported = middle["evaluate"].gpu_hours - middle["encode"].gpu_hours
    return {
        "is_in": _IS_IN,
        "is_in_hours": parts(ten) * _IS_IN / 3600,
        "text_ms": 512 * rates["text_us"] / 1000,
        "cut_gpu": _hours(cut.gpu_hours),
        "uncut_gpu": _hours(uncut.gpu_hours),
        "cut_bytes": _bytes(cut.passing),
        "uncut_bytes": _bytes(uncut.passing),
        "parts_100": uncapped,
        "most": MOST_BUCKETS,
        "capped": MOST_BUCKETS * hardware.answer / 3600 / AT_ONCE,
        "one_by_one": one_by_one,
        "at_once": AT_ONCE,
        "sixteen": one_by_one / AT_ONCE,
        "score_waits": _hours(middle["score"].waiting_hours),
        "ingest_100": _hours(middle["ingest"].hours),
        "ingest_1000": _hours(largest["ingest"].hours),
        "again_gpu": _hours(middle["retrieve"].gpu_hours),
        "encode_gpu": _hours(middle["encode"].gpu_hours),
        "reported_gpu": _hours(reported),
        "copies": _bytes(largest["retrieve"].node_disk),
        "llm_gpu": _hours(middle["generate"].gpu_hours),
        "prompt": rates["prompt_characters"] / 4,
    }


def _two_cores() -> str:
    """What the measured rates of models mean, without any GPU."""
    encode, score = result("encode")["ours"], result("score")["ours"]
    rows = [
        ["encode a million passages", f"{encode:.1f} passages/s", f"{1e6 / encode / 3600:.1f}"],
        ["judge a million pairs", f"{score:.1f} pairs/s", f"{1e6 / score / 3600:.1f}"],
    ]
    return _table(["what", "rate", "hours"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def _hours(hours: float) -> str:
    if hours < 0.005:
        return ""
    return f"{hours:.2f}" if hours < 1 else f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}"


def _bytes(size: float) -> str:
    """Decimal units, as disks and networks are sold; nothing for less than 50 MB."""
    if size < 5e7:
        return ""
    size /= 1e9
    unit = "GB"
    if size >= 1000:
        size, unit = size / 1000, "TB"
    return f"{size:,.1f} {unit}" if size < 10 else f"{size:,.0f} {unit}"


if __name__ == "__main__":
    main()
