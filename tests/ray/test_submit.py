"""`ray job submit` to a cluster started from the command line, as docs/cluster.md says.

A head that runs no work, two nodes that do, a token, which the head asks for because it is there, and on all
an image with an older retrieval_ray.
"""

import json
import re
import subprocess
import tempfile
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval_ray import __version__
from retrieval_ray.doctor import source_sha

from . import nodes
from .chat import KEY, Server, serving
from .conftest import ROOT, small_settings
from .test_kill import contents

Run = tuple[Path, list[str]]  # output folder, and what the job said
pytestmark = [pytest.mark.ray, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]
REFUSED = {
    "none": "Token authentication is enabled but no authentication token was found",
    "another": "Token authentication is enabled but the authentication token is invalid",
}
STAGES = [
    "corpus 'trade0'", "queries of 'trade0'", "encoding 'trade0'", "encoding queries", "retrieval on",
    "teacher on 'trade0': late", "groups of", "training on", "evaluation on",
]  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    """Short: the path of a socket may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="rr-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def writer() -> Iterator[str]:
    """An endpoint that writes queries."""
    with serving(Server()) as url:
        yield url


@pytest.fixture(scope="module")
def python(base: Path) -> Path:
    return nodes.image(base / "image")


@pytest.fixture(scope="module")
def dashboard(base: Path, python: Path) -> Iterator[nodes.Dashboard]:
    (base / "home").mkdir()
    nodes.make_token(base / "home")
    told = nodes.environment(base / "home", python, OPENAI_API_KEY=KEY)
    port, web = nodes.free_port(), nodes.free_port()
    here = ("--node-ip-address=127.0.0.1", "--object-store-memory=200000000")
    commands = {
        "head": [
            "--head", f"--port={port}", f"--dashboard-port={web}", "--num-cpus=0", "--resources",
            '{"driver_node": 1}', f"--ray-client-server-port={nodes.free_port()}",
        ],
        "large": [f"--address=127.0.0.1:{port}", "--num-cpus=4"],
        "small": [f"--address=127.0.0.1:{port}", "--num-cpus=2"],
    }  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    found = nodes.Dashboard(f"http://127.0.0.1:{web}", told)
    try:
        for count, (name, words) in enumerate(commands.items(), 1):
            # A folder each, like machines: two that unpack the same source into one are in each other's way.
            own = (f"--temp-dir={base / name}", f"--dashboard-agent-listen-port={nodes.free_port()}")
            command = nodes.ray("start", "--block", *words, *here, *own, python=python)
            log = base / f"{name}.log"
            joins = {} if name == "head" else {"RAY_AUTH_MODE": "token"}
            started.append(nodes.spawn(command, {**told, **joins}, log))
            nodes.wait_for_node(lambda count=count: len(found.nodes()) == count, started[-1], log)  # type: ignore[misc]
        nodes.wait_for_node(lambda: "Ray runtime started" in log.read_text(), started[-1], log)
        yield found
    finally:
        for process in reversed(started):
            nodes.end(process)


def settings(collection: Path, student: str, output: Path) -> list[str]:
    told = small_settings(collection, Path(student), output)
    return ["configs/cpu.yaml", *told, "compute.threads=1", "compute.workers=2", "train.max_epochs=1"]


@pytest.fixture(scope="module")
def whole(dashboard: nodes.Dashboard, collection: Path, student_folder: str, base: Path) -> Run:
    """The main job, undisturbed: its output folder and what it said."""
    log = base / "log"
    job = ["jobs/adapt.py", *settings(collection, student_folder, base / "whole")]
    code, said = dashboard.run("whole", *job, log=log)
    assert code == 0, "\n".join(said)
    return base / "whole", said


def test_without_the_token_nothing_is_submitted(dashboard: nodes.Dashboard, python: Path, base: Path) -> None:
    stranger = base / "stranger"
    stranger.mkdir()
    for name, told in {"none": {"RAY_AUTH_MODE": "disabled"}, "another": {"RAY_AUTH_TOKEN": "no"}}.items():
        user = {**nodes.environment(stranger, python), **told}
        log = base / f"{name}.log"
        process = nodes.Dashboard(dashboard.address, user).submit(name, "-V", log=log)
        assert process.wait(timeout=120) == 1
        assert REFUSED[name] in log.read_text()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            dashboard.ask(f"jobs/{name}")


def test_what_was_sent_runs_everywhere(
    dashboard: nodes.Dashboard, python: Path, student_folder: str, tmp_path: Path
) -> None:
    """The doctor compares the source of every node with the driver's."""
    told = nodes.environment(tmp_path, python)
    asked = [str(python), "-c", "import retrieval_ray; print(retrieval_ray.__version__)"]
    image = subprocess.run(asked, env=told, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert image.stdout.strip() == nodes.OLDER != __version__

    job = ["jobs/doctor.py", "configs/cpu.yaml", f"student.model={student_folder}"]
    job.append(f"output_dir={tmp_path / 'out'}")
    code, said = dashboard.run("doctor", *job, "compute.workers=2", log=tmp_path / "log")
    assert code == 0 and "3 nodes, 0 problems" in said[-1]
    rows = [line.split() for line in said if re.match(r"\S+-[0-9a-f]{6} ", line)]
    assert len(rows) == 3 and all(source_sha(ROOT / "retrieval_ray")[:8] in row for row in rows)

    code, said = dashboard.run("too-many", *job, "compute.workers=9", log=tmp_path / "log")
    assert code == 1 and "3 nodes, 1 problem" in said[-1]
    assert dashboard.ask("jobs/too-many")["driver_exit_code"] == 1


def test_a_user_error_is_one_line_and_exit_code_2(
    dashboard: nodes.Dashboard, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    """Ray's own command knows only 0 and 1; the job's code is in what Ray keeps of the job."""
    job = ["jobs/adapt.py", *settings(collection, student_folder, tmp_path / "out"), "compute.workers=9"]
    code, said = dashboard.run("wrong", *job, log=tmp_path / "log")
    assert code == 1 and dashboard.ask("jobs/wrong")["driver_exit_code"] == 2
    assert said[-1].startswith("error: compute.workers=9 needs 11 CPU") and "at most 6" in said[-1]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_log_is_the_jobs_own_lines(dashboard: nodes.Dashboard, whole: Run, base: Path) -> None:
    output, said = whole
    assert said[-1] == str(output / "metrics.json")
    places = [next(n for n, line in enumerate(said) if line.startswith(stage)) for stage in STAGES]
    assert places == sorted(places)
    assert len(said) < 60 and not [line for line in said if "Traceback" in line or "WARNING" in line]
    shown = (base / "log").read_text()
    assert all(line in shown for line in said)  # what is kept is what the submitter saw
    manifests = [json.loads(path.read_text()) for path in output.glob("store/*/manifest.json")]
    assert {facts["versions"]["retrieval-ray"] for facts in manifests} == {__version__}


def test_submitted_again_it_is_done_already(
    dashboard: nodes.Dashboard,
    whole: Run,
    collection: Path,
    student_folder: str,
    base: Path,
) -> None:
    output, first = whole
    before = contents(output)
    job = ["jobs/adapt.py", *settings(collection, student_folder, output)]
    code, said = dashboard.run("again", *job, log=base / "again.log")
    assert code == 0 and said[-1] == first[-1]
    for stage in STAGES:
        assert [line for line in said if line.startswith(stage) and "done already" in line], stage
    assert contents(output) == before


def test_a_plan_is_of_the_clusters_workers(
    dashboard: nodes.Dashboard, whole: Run, collection: Path, student_folder: str, base: Path
) -> None:
    """From another output folder: what is there already is found, and the sample is not the head's."""
    job = ["jobs/adapt.py", *settings(collection, student_folder, base / "plan")]
    job += [f"store={whole[0] / 'store'}", "train.max_epochs=3", "--dry-run"]
    code, said = dashboard.run("plan", *job, log=base / "plan.log")
    assert code == 0 and any(line.startswith("asking the cluster for a worker") for line in said)
    assert any(line.startswith("reuse  groups of") for line in said)
    (source,) = (line for line in said if line.startswith("forecast"))
    assert "of finished stages in this store and a sample of" in source and "on a worker (cpu)" in source


def test_stopped_in_the_middle_it_goes_on(
    dashboard: nodes.Dashboard,
    whole: Run,
    collection: Path,
    student_folder: str,
    base: Path,
) -> None:
    output = base / "broken"
    job = ["jobs/adapt.py", *settings(collection, student_folder, output)]
    for name, sign in (("stopped-1", "encode-*/vectors-*"), ("stopped-2", "train-*/checkpoint-*")):
        process = dashboard.submit(name, *job, log=base / f"{name}.log")
        nodes.wait_for(lambda sign=sign: list(output.glob(f"store/{sign}")), f"{name} at work", 600)  # type: ignore[misc]
        dashboard.stop(name)
        assert process.wait(timeout=120) == 0  # as docs/cluster.md says
        assert dashboard.ask(f"jobs/{name}")["status"] == "STOPPED"
    assert not (output / "metrics.json").exists()
    code, said = dashboard.run("resumed", *job, log=base / "resumed.log")
    assert code == 0, said
    assert contents(output) == contents(whole[0])


def test_every_other_job(
    dashboard: nodes.Dashboard,
    whole: Run,
    writer: str,
    collection: Path,
    student_folder: str,
    base: Path,
) -> None:
    """Generate, score, train and sweep; what they share with the main job is in its store already."""
    store = f"store={whole[0] / 'store'}"
    own = settings(collection, student_folder, base / "unused")
    run = base / "run.trec"
    run.write_text("".join(f"q{n} Q0 p{n + k} 1 0.5 tag\n" for n in range(8) for k in range(4)))
    space = ["configs/sweeps/lambda.yaml", "sweep.space={train.terms.clp: [0, 0.1]}"]
    llm = ["queries.sources=[llm]", "llm.engine=endpoint", f"llm.url={writer}", "llm.model=writer"]
    score = ["configs/score.yaml", f"pairs={run}", f"dataset.path={collection}", "compute.workers=2"]
    score += [f"student.model={student_folder}", "compute.precision=float32", "compute.threads=1"]
    jobs = {
        "generate": ([*own, *llm, "llm.passages=4"], "store/queries-"),
        "score": (score, "scores.json"),
        "adapt": ([*own, "--until", "train", "train.max_epochs=2"], None),
        "sweep": ([*space, *own[1:], "dataset.dev_split=null"], "leaderboard.parquet"),
    }
    for name, (words, last) in jobs.items():
        told = [f"jobs/{name}.py", *words, f"output_dir={base / name}", store]
        code, said = dashboard.run(name, *told, log=base / f"{name}.log")
        assert code == 0, "\n".join(said)
        assert not [line for line in said if "Traceback" in line]
        if name == "adapt":
            (trained,) = (line for line in said if line.startswith("training on"))
            assert "done already" not in trained and not (base / name / "metrics.json").exists()
            assert len(list((whole[0] / "store").glob("train-*/manifest.json"))) == 2
        if last:
            shown = [line for line in said if last in line]  # Ray's own lines may come after it
            assert shown and Path(shown[-1]).exists()
