"""The generate stage on a real endpoint over HTTP and on real vLLM engines, with kills in between."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from retrieval_ray.config import LlmConfig
from retrieval_ray.prompts import KINDS, Wanted, read_pool

from .chat import KEY, Server, serving
from .conftest import run_job, small_settings
from .llm import make_llm
from .test_kill import kill_tree, start, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def settings_of(collection: Path, student: str, output: Path, **llm: object) -> list[str]:
    return [
        *small_settings(collection, Path(student), output),
        "queries.sources=[llm]",
        *(f"llm.{key}={value}" for key, value in llm.items()),
    ]


def replies(output: Path) -> list[dict[str, Any]]:
    parts = sorted(output.glob("store/generate-*/replies-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def manifest(output: Path, stage: str) -> dict[str, Any]:
    (found,) = output.glob(f"store/{stage}-*/manifest.json")
    facts: dict[str, Any] = json.loads(found.read_text())
    return facts


def kept(output: Path) -> list[bytes]:
    """The keys of every reply in the cache, as often as they are there."""
    files = output.glob("store/replies/*/*/*/*.parquet")
    return [key for file in files for key in pq.read_table(file).column("key").to_pylist()]


# --- endpoint ------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    served = Server()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(served) as url:
        yield served, url


@pytest.mark.chaos
def test_an_endpoint_is_asked_once_for_every_request(
    server: tuple[Server, str], collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Refusals are tried again, a kill loses nothing that was kept, the key is nowhere, drops are counted."""
    served, url = server
    served.faults, served.delay, served.bad = 0.2, 0.05, "potters"
    output = tmp_path / "out"
    settings = settings_of(
        collection, student_folder, output,
        engine="endpoint", url=url, model="writer", passages=170, concurrency=8, max_failed=0.5,
        timeout_seconds=1.5,
    )  # fmt: skip

    log = tmp_path / "log"
    process = start([*settings, "--until", "queries"], log)
    assert wait_until(lambda: len(kept(output)) > 0, process, log)
    kill_tree(process)
    before, asked = set(kept(output)), len(served.asked)
    assert 0 < len(before) < 1020 and not list(output.glob("store/generate-*/manifest.json"))

    served.asked.clear()
    done = run_job("adapt", ["configs/cpu.yaml", *settings, "--until", "queries"])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = replies(output)
    failed = [row for row in rows if row["error"]]
    assert len(rows) == len({row["query_id"] for row in rows}) == 1020  # 170 passages x 6 kinds
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 170)
    assert failed and all("HTTP 400" in row["error"] and row["text"] is None for row in failed)
    answered = Counter(kept(output))
    assert max(answered.values()) == 1 and len(answered) == 1020 - len(failed)  # nothing was kept twice
    assert len(served.asked) == 1020 - len(before) < 1020 and asked >= len(before)

    facts, queries = manifest(output, "generate"), manifest(output, "queries")
    assert facts["failed"] == len(failed) and facts["rows_this_run"] == 1020 - len(before)
    assert facts["tokens"]["out"] == 6 * (1020 - len(before) - len(failed))
    assert queries["train"] + sum(queries["rejected"].values()) == 1020
    assert queries["rejected"]["no_reply"] == len(failed) and queries["samples"]["no_reply"]

    assert served.peak == 8
    assert served.keys == {f"Bearer {KEY}"}
    for path in [*output.rglob("*.*"), log]:
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in done.stderr + done.stdout

    served.asked.clear()
    served.faults = 0.0  # more kinds and more passages: only what is new is asked
    more = [*settings, "llm.passages=180", "llm.kinds={question: 2, title: 1}", "--until", "queries"]
    assert run_job("adapt", ["configs/cpu.yaml", *more]).returncode == 0
    asked_again = Counter(json.dumps([body["messages"], body["seed"]]) for body in served.asked)
    assert max(asked_again.values()) == 1
    new = 180 * 3 - 170 * 2  # ten new passages, and a second question for each of the others
    assert new <= len(served.asked) <= new + len(failed)  # what had failed is asked once more


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["queries.sources=[log,llm]", "queries.log_path=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["dataset.split=spring"], "spring"),
        (["dataset.dev_split=test"], "dev_split"),
        (["teacher.kind=cross_encoder", "teacher.model=/nowhere"], "teacher.model"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_call(
    server: tuple[Server, str],
    collection: Path,
    student_folder: str,
    tmp_path: Path,
    wrong: list[str],
    says: str,
) -> None:
    served, url = server
    settings = settings_of(
        collection, student_folder, tmp_path / "out", engine="endpoint", url=url, model="writer", passages=5
    )
    done = run_job("adapt", ["configs/cpu.yaml", *settings, *wrong])
    assert done.returncode == 2 and says in done.stderr and not served.asked, done.stderr[-2000:]


def test_too_many_failures_are_an_error_and_lose_nothing(
    server: tuple[Server, str], collection: Path, student_folder: str, tmp_path: Path
) -> None:
    served, url = server
    served.bad = "e"  # every passage has one
    settings = settings_of(
        collection, student_folder, tmp_path / "out", engine="endpoint", url=url, model="writer", passages=5
    )
    done = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "30 of 30 requests have no reply" in done.stderr and "content policy" in done.stderr
    served.bad = "potters"  # some, and for good
    settings += ["--until", "queries"]
    done = run_job("adapt", ["configs/cpu.yaml", *settings, "llm.max_failed=0.9", "llm.passages=20"])
    assert done.returncode == 0, done.stderr[-2000:]
    failed = manifest(tmp_path / "out", "generate")["failed"]
    assert 0 < failed < 120 and "llm.max_failed=0 asks them again" in done.stderr

    served.bad = ""  # and when the server is mended, those that are missing, and no others
    served.asked.clear()
    done = run_job("adapt", ["configs/cpu.yaml", *settings, "llm.max_failed=0", "llm.passages=20"])
    assert done.returncode == 0, done.stderr[-2000:]
    facts = manifest(tmp_path / "out", "generate")
    assert facts["failed"] == 0 and facts["rows"] == 120 and len(served.asked) == failed
    assert not [row for row in replies(tmp_path / "out") if row["error"]]
    plan = run_job("adapt", ["configs/cpu.yaml", *settings, "llm.passages=21", "--dry-run"]).stdout
    assert "126 requests, 95% of them answered already" in plan  # 20 of 21 passages


def test_every_negative_gets_a_query_and_those_that_are_there_are_taken(
    server: tuple[Server, str], collection: Path, student_folder: str, tmp_path: Path
) -> None:
    served, url = server
    output = tmp_path / "out"
    settings = [
        *settings_of(
            collection, student_folder, output,
            engine="endpoint", url=url, model="writer", passages=100, kinds="{question: 1}",
        ),
        "queries.sources=[log,llm]", "queries.negatives=true", "groups.require_first=false",
        "--until", "groups",
    ]  # fmt: skip
    done = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert done.returncode == 0, done.stderr[-3000:]
    (groups,) = output.glob("store/groups-*/groups.parquet")
    lists = pq.read_table(groups).to_pylist()
    negatives = {p for row in lists if row["split"] == "train" for p in row["passage_ids"][1:]}
    assert {p for row in lists for p in row["passage_ids"][1:]} > negatives  # of lists held out
    (found,) = output.glob("store/negatives-*/queries.parquet")
    rows = pq.read_table(found).to_pylist()
    assert {row["passage_id"] for row in rows} == negatives and len(rows) == len(negatives)
    assert all(row["text"].strip() and row["split"] == "negative" for row in rows)
    facts = manifest(output, "negatives")
    assert 0 < facts["reused"] < len(negatives) and facts["without"] == 0
    asked = Counter(body["messages"][-1]["content"] for body in served.asked)
    assert max(asked.values()) == 1  # no passage was asked for twice
    assert 100 < len(served.asked) <= 100 + len(negatives) - facts["reused"]

    every = [pq.read_table(path).to_pylist() for path in output.glob("store/queries-*/queries-*.parquet")]
    held_out = {row["query_id"] for row in pq.read_table(groups).to_pylist() if row["split"] == "dev"}
    measured = {
        row["text"]
        for part in every
        for row in part
        if row["split"] != "train" or row["query_id"] in held_out
    }
    assert len(measured) > len(held_out) > 0 and not measured & {row["text"] for row in rows}


# --- vLLM ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return make_llm(tmp_path_factory.mktemp("llm"))


def short_pool(folder: Path) -> Path:
    """Exemplars of a few words, for prompts that a CPU is soon through with."""
    written = ("question", "claim", "title", "keywords", "query")
    rows = [
        {"passage": f"{word} is sold here", **{kind: f"{kind} of {word}" for kind in written}}
        for word in ("tea", "ink")
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pool.jsonl"


def prompt_lengths(llm: Path, output: Path, pool: Path) -> list[int]:
    """Tokens of every prompt of a finished stage, by the tokenizer's own chat template."""
    import pyarrow as pa
    from transformers import AutoTokenizer

    parts = sorted(output.glob("store/corpus-*/corpus-*.arrow"))
    passages = [row for part in parts for row in pa.ipc.open_file(str(part)).read_all().to_pylist()]
    chosen = {row["passage_id"] for row in replies(output)}
    wanted = Wanted(dict.fromkeys(KINDS, 1), read_pool(str(pool)), None, LlmConfig().exemplar_sets, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    return [
        len(tokenizer.apply_chat_template(r.messages, add_generation_prompt=True, return_dict=False))
        for r in wanted.requests(
            (row["passage_id"], f"{row['title']} {row['text']}")
            for row in passages
            if row["passage_id"] in chosen
        )
    ]


@pytest.mark.vllm
@pytest.mark.chaos
@pytest.mark.timeout(1200)
def test_vllm_survives_kills_of_engine_and_job(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """The job is killed after its first replies; in the second start the engine process is killed."""
    output, log, pool = tmp_path / "out", tmp_path / "log", short_pool(tmp_path)
    settings = [
        *settings_of(
            collection, student_folder, output, model=llm, passages=200, max_tokens=24, exemplars=pool
        ),
        "llm.vllm={max_model_len: 4096, max_num_seqs: 32}", "--until", "generate",
    ]  # fmt: skip
    process = start(settings, log)
    assert wait_until(lambda: len(kept(output)) > 0, process, log)
    kill_tree(process)
    before = set(kept(output))
    assert 0 < len(before) < 1200

    process = start(settings, log)
    assert wait_until(lambda: len(kept(output)) > len(before), process, log)
    engines = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "EngineCore" in " ".join([p.name(), *p.cmdline()])
    ]
    for engine in engines:
        engine.send_signal(signal.SIGKILL)
    wait_until(lambda: False, process, log)  # to its end

    rows = replies(output)
    assert len(rows) == len({row["query_id"] for row in rows}) == 1200
    assert not [row for row in rows if row["error"]]
    assert max(Counter(kept(output)).values()) == 1 and len(kept(output)) == 1200
    assert sorted(row["tokens_in"] for row in rows) == sorted(prompt_lengths(llm, output, pool))
    facts = manifest(output, "generate")
    assert facts["rows"] == 1200 and facts["failed"] == 0
    assert 0.3 < facts["prefix_cache_hit_rate"] < 1  # instruction and exemplars are shared
    assert engines and facts["rows_this_run"] == 1200 - len(before)

    again = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert again.returncode == 0 and "done already (generate-" in again.stderr


@pytest.mark.vllm
@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_one_sequence_at_a_time_writes_the_same_after_a_kill(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Two parts of the corpus are two blocks of more rows than a batch; killed after the first."""

    def settings(output: Path) -> list[str]:
        return [
            *settings_of(
                collection, student_folder, output, model=llm, passages=90, temperature=0,
                exemplars=short_pool(tmp_path),
            ),
            "llm.vllm={max_model_len: 4096, max_num_seqs: 1, enable_prefix_caching: false}",
            "llm.max_tokens=8", "llm.kinds={question: 1, user_query: 1}", "--until", "generate",
        ]  # fmt: skip

    log = tmp_path / "log"
    process = start(settings(tmp_path / "killed"), log)
    assert wait_until(lambda: len(kept(tmp_path / "killed")) > 0, process, log)
    kill_tree(process)
    before = kept(tmp_path / "killed")
    assert 0 < len(before) < 180
    for name in ("killed", "whole"):
        assert run_job("adapt", ["configs/cpu.yaml", *settings(tmp_path / name)]).returncode == 0
    assert replies(tmp_path / "killed") == replies(tmp_path / "whole")
    assert (
        manifest(tmp_path / "killed", "generate")["parts"]
        == manifest(tmp_path / "whole", "generate")["parts"]
    )
    assert manifest(tmp_path / "killed", "generate")["rows_this_run"] == 180 - len(before)


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllms_own_server_is_driven_with_a_thousand_prompts(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pool = short_pool(tmp_path)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llm)]
    command += [
        "--served-model-name",
        "tiny",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    command += ["--enforce-eager", "--max-model-len", "2048"]
    log = (tmp_path / "server.log").open("ab")
    serving = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert serving.poll() is None, (tmp_path / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        output = tmp_path / "out"
        settings = settings_of(
            collection, student_folder, output, engine="endpoint", url=f"http://127.0.0.1:{port}/v1",
            model="tiny", passages=500, kinds="{question: 2}", max_tokens=8, concurrency=32, exemplars=pool,
            temperature=0,  # vLLM's CPU build dies of a seed, which a greedy request makes no use of
        )  # fmt: skip
        done = run_job("generate", ["configs/cpu.yaml", *settings, "--until", "generate"])
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        kill_tree(serving)
    written = replies(output)
    assert len(written) == len({row["query_id"] for row in written}) == 1000
    assert (
        not [row for row in written if row["error"]] and len(set(kept(output))) == len(kept(output)) == 1000
    )
    assert manifest(output, "generate")["tokens"]["in"] == sum(row["tokens_in"] for row in written) > 50_000


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_an_engine_that_dies_of_every_request_is_an_error(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Heads of 16 are too small for vLLM's CPU attention: it starts, and dies of the first prompt."""
    settings = [
        *settings_of(collection, student_folder, tmp_path / "out", passages=4),
        f"llm.model={make_llm(tmp_path / 'deadly', hidden=64)}", "llm.vllm={max_model_len: 4096}",
    ]  # fmt: skip
    done = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert done.returncode == 2, done.stderr[-3000:]
    assert "died without answering a request" in done.stderr.splitlines()[-1]


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_too_little_memory_at_the_start_is_an_error_and_no_hang(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4000")  # GiB
    settings = settings_of(collection, student_folder, tmp_path / "out", model=llm, passages=4)
    done = run_job("generate", ["configs/cpu.yaml", *settings])
    assert done.returncode == 2, done.stderr[-3000:]
    assert "vLLM could not start" in done.stderr.splitlines()[-1]


def test_engines_that_the_cluster_cannot_hold_are_refused_at_once(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    settings = settings_of(collection, student_folder, tmp_path / "out", model=llm, replicas=30)
    done = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert done.returncode == 2 and "llm.replicas=30" in done.stderr.splitlines()[-1]


def test_a_dry_run_shows_prompts_and_counts_tokens(
    llm: Path, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    settings = settings_of(
        collection, student_folder, tmp_path / "out", model=llm, passages=100, tokens_per_second=1000
    )
    done = run_job("adapt", ["configs/cpu.yaml", *settings, "--dry-run"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "600 requests" in done.stdout and "GPU hours (at 1,000 tokens/s" in done.stdout
    assert all(f"a prompt of the kind {kind}" in done.stdout for kind in KINDS)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["forecast.json"]
