"""What a cluster is started from, against Ray's own schema; and what travels with a submitted job."""

import copy
import importlib.metadata
import os
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from retrieval_ray.config_file import load

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
IMAGE = re.compile(r"EDIT/[\w-]+@sha256:[0-9a-f]{64}")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture
def launcher() -> dict[str, Any]:
    config: dict[str, Any] = read("cluster.yaml")
    return config


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The config as `ray up` completes and checks it. Not public, hence skipped where Ray moves it."""
    pytest.importorskip("jsonschema")
    util = pytest.importorskip("ray.autoscaler._private.util")
    whole: dict[str, Any] = util.prepare_config(copy.deepcopy(config))
    util.validate_config(whole)
    return whole


def test_the_launcher_takes_cluster_yaml(launcher: dict[str, Any]) -> None:
    whole = prepared(launcher)
    assert whole["docker"]["image"] == launcher["docker"]["image"]
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert whole[commands] == []  # the launcher's own defaults would install another Ray over the image's


@pytest.mark.parametrize("wrong", [{"head_node": 1}, {"available_node_types": {"head": {"resources": {}}}}])
def test_its_check_finds_what_is_wrong(launcher: dict[str, Any], wrong: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    with pytest.raises(jsonschema.ValidationError):
        prepared({**launcher, **wrong})


def test_the_head_runs_no_work(launcher: dict[str, Any]) -> None:
    head = launcher["available_node_types"][launcher["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "driver_node": 1} and head["max_workers"] == 0
    group = read("configs/kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert group["rayStartParams"]["num-cpus"] == "0" and group["rayStartParams"]["num-gpus"] == "0"


def test_each_pool_is_there_as_spot_and_on_demand(launcher: dict[str, Any]) -> None:
    """The same machine, so that both fit equally well and the priority decides."""
    types = launcher["available_node_types"]
    pools = {name.removesuffix("-spot") for name in types if name.endswith("-spot")}
    assert pools == {"cpu", "generate", "train"}
    for pool in pools:
        spot, fallback = types[f"{pool}-spot"], types[f"{pool}-on-demand"]
        assert spot["priority"] > fallback["priority"]
        assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
        for key in ("node_config", "resources", "max_workers"):
            assert spot[key] == fallback[key]


def test_a_worker_for_training_fits_on_no_node_for_generation(launcher: dict[str, Any]) -> None:
    """The CPUs of a worker say which pool it is for: the comments of cluster.yaml tell how many."""
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    cpus = {name: int(n) for name, n in re.findall(r"(\w+)-spot: #.*compute\.cpus_per_worker=(\d+)", text)}
    types = launcher["available_node_types"]
    for pool in ("generate", "train"):
        has = types[f"{pool}-spot"]["resources"]
        assert cpus[pool] * has["GPU"] < has["CPU"]  # and some to spare, for what Ray Data does itself
    assert cpus["train"] > types["generate-spot"]["resources"]["CPU"]


def test_every_node_spills_to_the_mounted_folder(launcher: dict[str, Any]) -> None:
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-spilling-directory=/mnt/spill" in launcher[commands][-1]
    assert "--volume /mnt/spill:/mnt/spill" in launcher["docker"]["run_options"]


@pytest.mark.parametrize(
    ("disks", "mounted", "done"),
    [
        (0, "", []),
        (1, "", ["mkfs.ext4 -qF /dev/nvme1n1", "mount /dev/nvme1n1 /mnt/spill"]),
        (8, "/mnt/spill", []),
        (1, "/opt/dlami/nvme", ["mount --bind /opt/dlami/nvme /mnt/spill"]),
    ],
)
def test_a_machine_s_own_disk_holds_copies_and_spilled_objects(
    launcher: dict[str, Any], tmp_path: Path, disks: int, mounted: str, done: list[str]
) -> None:
    """Where it has one, and only once: the launcher says its commands anew with each `ray up`."""
    models = ["Amazon Elastic Block Store", *["Amazon EC2 NVMe Instance Storage"] * disks]
    listed = "\n".join(f"/dev/nvme{n}n1 {model}" for n, model in enumerate(models))
    fakes = {
        "lsblk": f"echo '{listed}'",
        "mountpoint": f'[ "$2" = "{mounted}" ]',
        "sudo": f'echo "$@" >> {tmp_path}/log',
    }
    for name, line in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (command,) = launcher["initialization_commands"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], env={"PATH": path}, check=True)
    said = (tmp_path / "log").read_text().splitlines()
    assert said == ["mkdir -p /mnt/spill", *done, "chmod 1777 /mnt/spill"]


def test_copies_lie_where_objects_are_spilled_and_rays_own_files_do_not(launcher: dict[str, Any]) -> None:
    assert {"--env TMPDIR=/mnt/spill", "--env RAY_TMPDIR=/tmp"} <= set(launcher["docker"]["run_options"])
    for pod in pods():
        own = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert own == {"TMPDIR": "/spill", "RAY_TMPDIR": "/tmp"}


def test_every_machine_has_a_role_and_the_head_one_of_its_own(launcher: dict[str, Any]) -> None:
    """The role that Ray makes for a head may not give the workers theirs."""
    types = launcher["available_node_types"]
    roles = {name: kind["node_config"]["IamInstanceProfile"]["Arn"] for name, kind in types.items()}
    head = roles.pop(launcher["head_node_type"])
    (workers,) = set(roles.values())
    assert head != workers and all(role.startswith("EDIT: of the ") for role in (head, workers))


def test_every_machine_runs_the_image_that_the_user_chose(launcher: dict[str, Any]) -> None:
    """Ray's own default has a driver too old for the container's CUDA."""
    kinds = launcher["available_node_types"].values()
    assert {kind["node_config"]["ImageId"] for kind in kinds} == {"EDIT: ami-..."}


def test_tokens_are_asked_for_everywhere(launcher: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in launcher["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][-1]
    spec = read("configs/kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}


def test_images_are_placeholders_by_digest(launcher: dict[str, Any]) -> None:
    """A user must fill them in, and both files say so."""
    images = {launcher["docker"]["image"], *(pod["containers"][0]["image"] for pod in pods())}
    assert len(images) == 1 and IMAGE.fullmatch(images.pop())
    for name in ("cluster.yaml", "configs/kuberay/rayjob.yaml"):
        assert "# FILL IN what is marked EDIT" in (ROOT / name).read_text(encoding="utf-8")


def pods() -> Iterator[dict[str, Any]]:
    spec = read("configs/kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield group["template"]["spec"]


def test_pods_have_shared_memory_and_room_to_spill_and_no_root() -> None:
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "emptyDir" in volumes[mounts["/spill"]]
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_pods_leave_some_of_a_machine_to_kubernetes(launcher: dict[str, Any]) -> None:
    """One that asks for all of it is never scheduled; and a worker leaves some of its pod to Ray Data."""
    spec = read("configs/kuberay/rayjob.yaml")["spec"]
    types = launcher["available_node_types"]
    (worker,) = re.findall(r"compute\.cpus_per_worker=(\d+)", spec["entrypoint"])
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        asked = group["template"]["spec"]["containers"][0]["resources"]
        assert asked["limits"] == asked["requests"]
        has = types[group["groupName"]]["resources"]
        assert int(asked["requests"]["cpu"]) < has["CPU"] and int(worker) < int(asked["requests"]["cpu"])
        assert int(asked["requests"]["nvidia.com/gpu"]) == has["GPU"]


def test_the_ray_job_runs_a_job_of_the_image() -> None:
    spec = read("configs/kuberay/rayjob.yaml")["spec"]
    assert spec["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    program, script, config, *overrides = spec["entrypoint"].split()
    place = re.findall(r"^WORKDIR (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert program == "python" and script.startswith(f"{place[-1]}/") and config.startswith(f"{place[-1]}/")
    assert (ROOT / Path(script).relative_to(place[-1])).is_file()
    assert load(str(ROOT / Path(config).relative_to(place[-1])), overrides).compute.cpus_per_worker == 6


def test_the_image_is_an_official_one_of_the_pinned_ray_and_has_no_root() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"ARG BASE=rayproject/ray:{importlib.metadata.version('ray')}-py311-cu130" in lines
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    assert not [line for line in lines if "://" in line or "--index-url" in line]
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {f"!{word}" for word in copied} <= set(ignored)
    assert all((ROOT / word).exists() for word in copied)


def test_what_travels_with_a_submitted_job(tmp_path: Path) -> None:
    """The jobs, the configs and the package as git knows them, whatever else lies beside them."""
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    constants = pytest.importorskip("ray._private.ray_constants")
    package = tmp_path / "package.zip"
    packaging.create_package(
        str(ROOT),
        package,
        include_gitignore=True,
        excludes=constants.get_runtime_env_default_excludes(),
    )
    files = {info.filename: info.file_size for info in zipfile.ZipFile(package).infolist()}
    sent = {name for name in files if not name.endswith("/")}
    assert {name.partition("/")[0] for name in sent} == {"jobs", "configs", "retrieval_ray"}
    assert {Path(name).suffix for name in sent} == {".py", ".yaml", ".jsonl", ".tsv", ".typed"}
    assert len(sent) < 300 and max(files.values()) < MIB / 4 and package.stat().st_size < 3 * MIB
    tracked = subprocess.run(
        ["git", "ls-files", "jobs", "configs", "retrieval_ray", ":!configs/grafana"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode == 0:  # not in a source archive
        assert set(tracked.stdout.split()) <= sent
