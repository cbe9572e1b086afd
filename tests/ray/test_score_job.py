"""jobs/score.py: given pairs judged and nothing else; engines agree; kills change nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval_ray.config_file import load
from retrieval_ray.errors import UserError
from retrieval_ray.stages import job
from retrieval_ray.teachers.cross_encoder import CrossEncoder

from .conftest import ROOT, foreseen_rows, job_module, run_job
from .llm import make_llm

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = str(ROOT / "configs" / "score.yaml")
SMALL = ["compute.precision=float32", "compute.token_budget=1024", "compute.threads=1"]


def score(*settings: str) -> dict[str, Any]:
    """The job in this process; returns scores.json."""
    context = job.open_run(load(CONFIG, [*SMALL, *settings]), dry_run=False)
    where = job_module("score").write(context, None)
    found: dict[str, Any] = json.loads(Path(where).read_text())
    return found


def table(output: Path, name: str = "scores") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / f"{name}.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def teacher(cross_encoder_folder: str) -> list[str]:
    return ["teacher.kind=cross_encoder", f"teacher.model={cross_encoder_folder}", "teacher.max_tokens=64"]


def test_a_run_of_ids_is_judged_with_the_collections_texts(
    ray_local: None,
    collection: Path,
    teacher: list[str],
    cross_encoder_folder: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run.trec"
    ids = [(f"q{n}", f"p{(7 * n + k) % 640}") for n in range(40) for k in range(30)]
    lines = [f"{q} Q0 {p} 1 0.5 tag\n" for q, p in ids]
    run.write_text("".join([*lines, lines[0], "q0 Q0 nowhere 1 1 tag\n", "half a line\n"]))
    settings = [f"pairs={run}", f"dataset.path={collection}", *teacher, f"output_dir={tmp_path / 'out'}"]
    plan = job.open_run(load(CONFIG, [*SMALL, *settings, "compute.workers=2"]), dry_run=True)
    job_module("score").write(plan, None)
    said = capsys.readouterr().out
    assert "run    pairs of " in said and " 1,201 pairs " in said
    assert not (tmp_path / "out" / "store").exists()
    facts = score(*settings, "compute.workers=2")
    foreseen = foreseen_rows(tmp_path / "out")
    assert foreseen["pairs"] == [(1201, 1201)]
    ((most, judged),) = foreseen["score-cross_encoder"]
    assert judged == 1200 <= most < 1300
    rows = table(tmp_path / "out")
    assert facts["rows"] == len(rows) == 1200 and facts["rejected"] == {"unknown_passage": 1, "malformed": 1}
    assert facts["repeated"] == 1
    assert {(row["query_id"], row["passage_id"]) for row in rows} == set(ids)
    assert [row["detail"] for row in table(tmp_path / "out", "rejects")] == [
        "nowhere",
        "3 fields, a line of a TREC run has 6",
    ]
    passages = {
        r["_id"]: f"{r['title']} {r['text']}" for r in map(json.loads, (collection / "corpus.jsonl").open())
    }
    queries = {r["_id"]: r["text"] for r in map(json.loads, (collection / "queries.jsonl").open())}
    sample = rows[::37]
    expected = CrossEncoder(cross_encoder_folder, max_tokens=64, device="cpu").score(
        [queries[row["query_id"]] for row in sample], [passages[row["passage_id"]] for row in sample]
    )
    np.testing.assert_allclose([row["score"] for row in sample], expected, atol=1e-4)

    again = score(*settings)
    assert {k: again[k] for k in ("rows", "rejected")} == {k: facts[k] for k in ("rows", "rejected")}
    more = tmp_path / "more.trec"
    more.write_text("".join([*lines, "q0 Q0 p639 1 1 tag\n"]))
    facts = score(
        f"pairs={more}", f"dataset.path={collection}", *teacher, f"output_dir={tmp_path / 'more'}",
        f"store={tmp_path / 'out' / 'store'}",
    )  # fmt: skip
    judged = facts["teachers"]["cross_encoder"]
    assert (facts["rows"], judged["rows_this_run"], judged["from_cache"]) == (1201, 1, 1200)
    assert facts["repeated"] == 0


STRANGE = [
    {"query": "who", "passage": "wordy " * 20_000},
    {"query": "who", "passage": ""},
    {"query": "", "passage": "silk"},
    {"query": "half \ud83d pair", "passage": "silk \udfff"},
    {"query": "x" * 100_000, "passage": "y" * 100_000},
    {"query": "who\0", "passage": "\u202e\U000e0fff 👩‍👩‍👧‍👦"},
]


def test_odd_texts_are_scored_or_rejected_and_stop_nothing(
    ray_local: None, teacher: list[str], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    plain = [{"query_id": f"plain{n}", "query": f"query {n}", "passage": f"text {n}"} for n in range(20)]
    pairs.write_text(
        "".join(json.dumps(row) + "\n" for row in [*STRANGE, *plain, {"query": None, "passage": 1}])
    )
    members = f"[{{kind: late}}, {{model: {teacher[1].partition('=')[2]}, max_tokens: 64}}]"
    facts = score(
        f"pairs={pairs}", "teacher.kind=ensemble", f"teacher.members={members}", f"output_dir={tmp_path}/out"
    )
    assert set(facts["teachers"]) == {"late", "cross_encoder"}
    rows = table(tmp_path / "out")
    for name in ("late", "cross_encoder"):
        own = [row for row in rows if row["teacher"].startswith(name)]
        judged = facts["teachers"][name]["rows"]
        assert (
            len(own) == judged
            and len({row["query_id"] for row in own} & {f"plain{n}" for n in range(20)}) == 20
        )
        rejected = [r for r in table(tmp_path / "out", "rejects") if r["stage"] == "score"]
        assert judged <= len(STRANGE) + 20
    assert len(rows) + len(rejected) == 2 * (len(STRANGE) + 20)
    assert all(np.isfinite(row["score"]) for row in rows)
    assert facts["rejected"]["malformed"] == 1


def test_what_the_user_must_mend_is_said(
    ray_local: None, collection: Path, teacher: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run.trec"
    run.write_text("nobody Q0 nowhere 1 1 tag\n")
    out = f"output_dir={tmp_path / 'out'}"
    with pytest.raises(UserError, match="name the run or the table"):
        score(*teacher, out)
    with pytest.raises(UserError, match=r"no pair is left.*1 unknown_query.*dataset.path"):
        score(*teacher, out, f"pairs={run}", f"dataset.path={collection}")
    with pytest.raises(UserError, match="bm25 and dense come from a retrieval"):
        score(out, f"pairs={run}", "teacher.kind=embedded")
    done = run_job("score", [CONFIG, f"pairs={tmp_path / 'nowhere.trec'}", out])
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(
        "error: pairs: no such file"
    )


@pytest.mark.vllm
def test_both_engines_of_a_yes_no_teacher_agree(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    pairs = tmp_path / "pairs.jsonl"
    texts = ["silk of the village " * n for n in (0, 1, 3, 9, 200)]
    pairs.write_text(
        "".join(json.dumps({"query": f"who {n}", "passage": t}) + "\n" for n in range(4) for t in texts)
    )
    llm = make_llm(tmp_path / "llm")
    # one is seen whole, of the other only the two tokens: with a template of its own
    settings = [
        f"pairs={pairs}", "teacher.kind=yes_no", f"teacher.model={llm}", "teacher.max_tokens=256",
        "teacher.tokens=[y, n]", "teacher.template='<|user|>{query}: {passage} yes or no?<|assistant|>'",
        f"store={tmp_path / 'store'}",
    ]  # fmt: skip
    found = {}
    for engine in ("transformers", "vllm"):
        output = tmp_path / engine
        done = run_job(
            "score", [CONFIG, *SMALL, *settings, f"teacher.engine={engine}", f"output_dir={output}"]
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = {(row["query_id"], row["passage_id"]): row["score"] for row in table(output)}
    one, other = found.values()
    assert one.keys() == other.keys() and len(one) == 20
    assert max(abs(one[pair] - other[pair]) for pair in one) < 1e-4
    assert np.std(list(one.values())) > 1e-3
