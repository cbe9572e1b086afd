"""Training on several ranks, whole and sharded, against training on one."""

import importlib.util
import shutil
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor

from retrieval_ray import ranks, step
from retrieval_ray.artifacts import Location
from retrieval_ray.checkpoints import load_weights
from retrieval_ray.experts import add_experts
from retrieval_ray.fit import best_weights, fit
from retrieval_ray.lora import add_lora
from retrieval_ray.moe import Layout
from retrieval_ray.sharding import shard
from retrieval_ray.student import Student
from retrieval_ray.tokens import TokenRows
from tests.corpora import SETTINGS, Killed, assert_near, kill_at, tiny_corpus

pytestmark = pytest.mark.slow
RANKS = 2
WITH_LORA = importlib.util.find_spec("peft") is not None
# so few tokens to a chunk that ranks get different numbers of them; a peak that keeps rounding small
SMALL = replace(SETTINGS, chunk_tokens=60, learning_rate=1e-4)
STUDENTS = {"experts": {"experts": True}, "bfloat16": {"precision": "bfloat16"}}
if WITH_LORA:
    STUDENTS["lora"] = {"lora": True}


LISTS = {"drawn": {"settings": replace(SMALL, list_sample=2)}, "not finite": {"spoiled": 3}}


def _student(model, *, lora=False, experts=False, precision="float32"):
    student = Student(model, precision=precision, device="cpu")
    if lora:
        add_lora(student, r=2, alpha=None, targets=None, seed=0)
    if experts:
        add_experts(student.model, Layout(3), seed=1)
    return student


def _fit(model, words, target, *, sharded=False, how=None, settings=SMALL, spoiled=None, **more):
    """spoiled: the list whose scores are not finite."""
    how = how or {}
    student, corpus = _student(model, **how), tiny_corpus(words)
    if "experts" in how:
        settings = replace(settings, balance_weight=0.1, jitter=0.2)
    if spoiled is not None:
        corpus.train.teacher_BK[spoiled] = np.nan
    if sharded:
        shard(student, torch.device("cpu"))
    progress = fit(student, [corpus], settings, Location.of(str(target)), **more)
    return progress, student


def _rank(rank, model, words, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found, shares, true_deal = {}, [], step.deal

    def deal(costs, workers):
        owner = true_deal(costs, workers)
        shares.append([owner.count(rank) for rank in range(workers)])
        return owner

    step.deal = deal
    with pytest.raises(Killed):
        _fit(model, words, folder / "elastic", on_step=kill_at(4))
    progress, student = _fit(model, words, folder / "sharded", sharded=True)
    found["share"] = sum(p.to_local().numel() for p in student.model.parameters() if isinstance(p, DTensor))
    found["whole"] = {name: p.full_tensor().detach() for name, p in student.model.named_parameters()}
    found["progress"] = progress
    with pytest.raises(Killed):
        _fit(model, words, folder / "broken", sharded=True, on_step=kill_at(4))
    if rank == 0:
        shutil.copytree(folder / "broken", folder / "sharded, then one")
    dist.barrier()
    resumed, student = _fit(model, words, folder / "broken", sharded=True)
    found["again"] = {name: p.full_tensor().detach() for name, p in student.model.named_parameters()}
    found["resumed"] = resumed
    for key, how in STUDENTS.items():
        trained, student = _fit(model, words, folder / key, sharded=True, how=how)
        weights = {name: p.full_tensor().detach() for name, p in student.model.named_parameters()}
        found[key] = trained, weights
    for key, how in LISTS.items():
        trained, student = _fit(model, words, folder / key, **how)
        found[key] = trained, _weights(student)
    found["chunks"] = shares
    for key, is_sharded in (("whole", False), ("sharded", True)):
        half = Student(model, precision="bfloat16", device="cpu")
        if is_sharded:
            shard(half, torch.device("cpu"))
        with half.autocast():
            found[f"casts kept, {key}"] = torch.is_autocast_cache_enabled()
    tempfile.tempdir = str(folder)
    for key, machine in (("one machine", "a"), ("two machines", rank)):
        ranks._machine = lambda machine=machine: machine
        read = []
        rows = TokenRows(["b", "a"], lambda ids, read=read: read.extend(ids) or [np.zeros(2)] * len(ids))
        found[key] = read, {text_id: row.tolist() for text_id, row in rows.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(student_folder, words, tmp_path_factory):
    """Where two processes trained; ``0.pt`` and ``1.pt`` say what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, (student_folder, words, folder), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def one(student_folder, words, tmp_path_factory):
    """What one process makes of it."""
    progress, student = _fit(student_folder, words, tmp_path_factory.mktemp("one"))
    return progress, _weights(student)


def _weights(student):
    return {name: p.detach() for name, p in student.model.named_parameters()}


def _same_steps(ours, theirs):
    """The same batches, tokens and rates, and losses up to rounding."""
    assert len(ours.steps) == len(theirs.steps)
    for row, expected in zip(ours.steps, theirs.steps, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
        assert [row[name] for name in ("tokens", "encoded")] == [expected[n] for n in ("tokens", "encoded")]


def test_sharded_training_is_training(found, one, student_folder):
    before = _weights(Student(student_folder, precision="float32", device="cpu"))
    moved = max(float((one[1][name] - weight).abs().max()) for name, weight in before.items())
    assert moved > 1e-4
    assert any(ours != theirs for ours, theirs in found[0]["chunks"])  # a rank has to go along without work
    for rank in found:
        _same_steps(rank["progress"], one[0])
        assert_near(rank["whole"], one[1], 1e-6)


def test_each_rank_holds_its_share(found, one):
    numbers = sum(weight.numel() for weight in one[1].values())
    shares = [rank["share"] for rank in found]
    assert sum(shares) == numbers and max(shares) < 0.6 * numbers


def test_one_rank_of_each_machine_tokenises(folder, found):
    rows = {"a": [0, 0], "b": [0, 0]}
    assert [rank["one machine"] for rank in found] == [(["a", "b"], rows), ([], rows)]
    assert [rank["two machines"] for rank in found] == [(["a", "b"], rows)] * 2
    assert not list(folder.glob("retrieval_ray-tokens-*"))


def test_casts_of_gathered_weights_are_not_kept(found):
    """They would be, of every layer, for as long as the pass over all chunks lasts."""
    assert [(rank["casts kept, whole"], rank["casts kept, sharded"]) for rank in found] == [(True, False)] * 2


def test_a_sharded_run_resumes_to_the_same_bits(found):
    for rank in found:
        assert rank["resumed"].steps == rank["progress"].steps
        assert rank["resumed"].history == rank["progress"].history
        assert all(torch.equal(rank["whole"][name], weight) for name, weight in rank["again"].items())


@pytest.mark.parametrize("before", ["elastic", "sharded, then one"])
def test_a_run_of_two_workers_goes_on_with_one(folder, found, one, student_folder, words, before):
    resumed, student = _fit(student_folder, words, folder / before)
    assert len(one[0].steps) > 4
    _same_steps(resumed, one[0])
    assert_near(_weights(student), one[1], 1e-6)


def test_sharded_weights_are_those_of_a_whole_student(folder, found, student_folder):
    student = Student(student_folder, precision="float32", device="cpu")
    best = found[0]["progress"].best_epoch
    load_weights(student, best_weights(Location.of(str(folder / "sharded")), best))
    assert all(torch.equal(found[0]["whole"][name], weight) for name, weight in _weights(student).items())


@pytest.mark.parametrize("key", STUDENTS)
def test_any_student_may_be_sharded(found, student_folder, words, tmp_path, key):
    progress, student = _fit(student_folder, words, tmp_path, how=STUDENTS[key])
    expected, start = _weights(student), _weights(_student(student_folder, **STUDENTS[key]))
    learns = {"lora": ".lora_B", "experts": ".router"}.get(key, "")
    moved = [float((weight - start[name]).abs().max()) for name, weight in expected.items() if learns in name]
    assert max(moved) > 1e-4
    for rank in found:
        trained, weights = rank[key]
        _same_steps(trained, progress)
        assert trained.load == progress.load  # what experts took, counted over both ranks
        assert_near(weights, expected, 1e-6)


@pytest.mark.parametrize("key", LISTS)
def test_two_ranks_draw_and_skip_as_one_does(found, student_folder, words, tmp_path, key):
    progress, student = _fit(student_folder, words, tmp_path, **LISTS[key])
    assert [row["step"] for row in progress.skipped] == ([] if key == "drawn" else [1, 6])
    for rank in found:
        trained, weights = rank[key]
        _same_steps(trained, progress)
        assert trained.skipped == progress.skipped
        assert_near(weights, _weights(student), 1e-6)
