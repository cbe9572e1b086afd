"""The whole job with store and output in an object store: S3's protocol, and Google Cloud Storage's."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval_ray.artifacts import Location

from .conftest import run_job, small_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow]


SERVERS = {
    "s3": (["-m", "moto.server", "-H", "127.0.0.1", "-p"], "AWS_ENDPOINT_URL", "PUT", "/lake"),
    "gs": (
        ["-m", "gcp_storage_emulator", "start", "--in-memory", "--default-bucket", "lake", "--port"],
        "CLOUD_STORAGE_EMULATOR_ENDPOINT", "GET", "/storage/v1/b/lake",
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(SERVERS))
def bucket(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """``s3://lake`` or ``gs://lake`` on a server of its own, S3's or Google Cloud Storage's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments, variable, method, path = SERVERS[request.param]
    server = subprocess.Popen(
        [sys.executable, *arguments, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                asked = urllib.request.Request(f"{endpoint}{path}", method=method)
                urllib.request.urlopen(asked, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("the server did not start")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        account = _service_account(tmp_path_factory.mktemp("account"))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", account)
        monkeypatch.setenv(variable, endpoint)
        yield f"{request.param}://lake"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _service_account(folder: Path) -> str:
    """Credentials of nobody, made here: Google's client signs with them and asks no other server."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "account.json"
    facts = {"client_email": "tester@nowhere", "private_key_id": "none", "private_key": key.decode()}
    path.write_text(json.dumps({"type": "service_account", "token_uri": "https://nowhere", **facts}))
    return str(path)


def test_everything_lies_in_the_bucket(
    bucket: str, collection: Path, student_folder: str, tmp_path: Path
) -> None:
    from pyarrow import fs

    before = set(os.listdir(tmp_path))
    settings = [
        *small_settings(collection, Path(student_folder), Path("unused")),
        f"output_dir={bucket}/run",
        f"store={bucket}/team",
        "train.max_epochs=1",
    ]
    done = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{bucket}/run/metrics.json"

    there, _ = fs.FileSystem.from_uri(bucket)
    files = {info.path for info in there.get_file_info(fs.FileSelector("lake", recursive=True))}
    assert {"lake/run/metrics.json", "lake/run/report.html", "lake/run/model/modules.json"} <= files
    assert {path for path in files if path.startswith("lake/run/tensorboard/round-1-") and "tfevents" in path}
    assert not {path for path in files if path.endswith(".tmp") or "/partial-" in path}
    with there.open_input_stream("lake/run/metrics.json") as stream:
        metrics = json.loads(stream.read())
    assert metrics["training"] is not None
    assert set(os.listdir(tmp_path)) == before  # nothing on the disk of whoever started it

    again = run_job("adapt", ["configs/cpu.yaml", *settings])
    assert again.returncode == 0 and again.stderr.count("done already") >= 12


def test_an_upload_that_breaks_off_leaves_nothing(bucket: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half " * 2**20
        raise OSError("a peer is gone")

    there = Location.of(f"{bucket}/checkpoint")
    with pytest.raises(OSError, match="a peer is gone"):
        there.write_pieces(pieces())
    assert not there.exists()
