"""One training step = plain backward through the whole batch, for any chunks and any ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.functional import normalize

from retrieval_ray.objective import Objective
from retrieval_ray.step import Lists, embed_shared, training_step
from retrieval_ray.student import Student
from tests import oracles

OBJECTIVE = Objective(
    {"kl": 1.0, "infonce": 0.1},
    student_temperature=0.05,
    teacher_temperature=0.3,
    infonce_temperature=0.02,
)
RANKS = 3
CHUNKS = (1, 60, 100_000)  # one text a chunk; several; two chunks in all, so that a rank has none


class DoubleStudent:
    """What the step needs of a student, in float64."""

    def __init__(self, folder):
        self.inner = Student(folder, precision="float32", device="cpu")
        self.model = self.inner.model.double()
        self.device, self.dimension = self.inner.device, self.inner.dimension
        self.autocast = self.inner.autocast

    def embed(self, rows, role):
        features = self.inner._features(rows, role)
        return normalize(self.model(features)["sentence_embedding"], dim=-1)


def _student(folder):
    return Student(folder, precision="float32", device="cpu")


def _batch(size, *, places=4, passages=9, seed=0):
    """Lists that share passages, with exclusions in the own list, in others' and nowhere."""
    rng = np.random.default_rng(seed)
    ids = [f"p{n}" for n in range(passages)]
    lists = [[str(passage) for passage in rng.permutation(ids)[:places]] for _ in range(size)]
    excluded = [[str(p) for p in rng.choice([*ids, "elsewhere"], 3) if p != row[0]] for row in lists]
    teacher = rng.random((size, places))
    return Lists([f"q{n}" for n in range(size)], lists, teacher, excluded)


def _rows(seed=0):
    """Token rows of every query and passage, of different lengths."""
    rng = np.random.default_rng(seed)
    names = [*(f"q{n}" for n in range(9)), *(f"p{n}" for n in range(9))]
    return {
        name: np.array([2, *rng.integers(5, 261, rng.integers(2, 20)), 3], dtype=np.int64) for name in names
    }


def _step(student, batch, chunk_tokens, rows=None):
    rows = rows or _rows()
    return training_step(
        student, batch, rows.__getitem__, rows.__getitem__, OBJECTIVE, chunk_tokens=chunk_tokens
    )


def _terms(facts):
    return {name: value for name, value in facts.items() if not name.endswith("_seconds")}


def _gradients(student):
    return {name: parameter.grad for name, parameter in student.model.named_parameters()}


def _naive(student, batch):
    """The papers' loss: every list's passages encoded with it, again and again, in one graph."""
    rows = _rows()
    queries = student.embed([rows[q] for q in batch.query_ids], "query").double()
    vectors = [student.embed([rows[p] for p in row], "passage").double() for row in batch.passage_ids]
    scores = torch.stack([own @ query for own, query in zip(vectors, queries, strict=True)])
    kl = oracles.listwise_kl(scores, torch.from_numpy(batch.teacher_BK).double(), 0.05, 0.3)
    infonce = oracles.infonce(queries, vectors, batch.passage_ids, batch.excluded_ids, 0.02)
    loss = kl + 0.1 * infonce
    loss.backward()
    return {"kl": kl.item(), "infonce": infonce.item(), "loss": loss.item()}


def _same(ours, theirs, *, relative):
    """The same parameters have gradients, and these are equal within a share of the largest."""
    assert {n for n, g in ours.items() if g is None} == {n for n, g in theirs.items() if g is None}
    largest = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    assert largest > 1e-3
    for name, gradient in theirs.items():
        if gradient is not None:
            worst = float((ours[name] - gradient).abs().max())
            assert worst <= relative * largest, (name, worst, largest)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_gradient_is_the_plain_one_in_float64(student_folder, float64, size, chunk_tokens):
    batch, ours, plain = _batch(size), DoubleStudent(student_folder), DoubleStudent(student_folder)
    terms, expected = _step(ours, batch, chunk_tokens), _naive(plain, batch)
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    _same(_gradients(ours), _gradients(plain), relative=1e-10)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_the_gradient_is_the_plain_one_in_float32(student_folder, chunk_tokens):
    batch, ours, plain = _batch(6), _student(student_folder), _student(student_folder)
    terms, expected = _step(ours, batch, chunk_tokens), _naive(plain, batch)
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    _same(_gradients(ours), _gradients(plain), relative=2e-5)


def test_the_loss_is_computed_in_float64_from_float32_embeddings(student_folder):
    """At InfoNCE's temperature, float32 cosines would cost the loss its sixth digit."""
    student, batch, rows = _student(student_folder), _batch(6), _rows()
    passages = [rows[f"p{n}"] for n in range(9)]
    found, _ = embed_shared(student, [rows[q] for q in batch.query_ids], passages, chunk_tokens=60)
    vectors = {f"p{n}": found[6 + n].double() for n in range(9)}
    lists = [[vectors[passage] for passage in row] for row in batch.passage_ids]
    expected = oracles.infonce(found[:6].double(), lists, batch.passage_ids, batch.excluded_ids, 0.02)
    assert len({p for row in batch.passage_ids for p in row}) == 9  # so the chunks are the same
    assert _step(student, batch, 60)["infonce"] == pytest.approx(expected.item(), rel=1e-11)


def test_bfloat16_points_the_same_way(student_folder):
    half, full = Student(student_folder, precision="bfloat16", device="cpu"), _student(student_folder)
    for student in (half, full):
        _step(student, _batch(6), 60)
    ours, theirs = (
        torch.cat([g.flatten() for g in _gradients(student).values() if g is not None])
        for student in (half, full)
    )
    assert ours.dtype == torch.float32
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98


def test_the_loss_is_named_terms_and_counts(student_folder):
    batch = _batch(6)
    terms = _step(_student(student_folder), batch, 60)
    assert terms["loss"] == pytest.approx(terms["kl"] + 0.1 * terms["infonce"])
    assert terms["passages"] == 6 * 4
    assert terms["encoded"] == len({passage for row in batch.passage_ids for passage in row})


def test_excluded_ids_are_masked_over_the_whole_batch(student_folder):
    """A passage that only other lists hold is left out of a query's InfoNCE, and KL is not touched."""
    batch = _batch(3, passages=9, seed=1)
    own = set(batch.passage_ids[0])
    foreign = sorted({p for row in batch.passage_ids for p in row} - own)
    assert foreign
    losses = {}
    for name, left_out in (("none", []), ("foreign", foreign), ("absent", ["not in the batch"])):
        lists = Lists(batch.query_ids, batch.passage_ids, batch.teacher_BK, [left_out, [], []])
        losses[name] = _terms(_step(_student(student_folder), lists, 60))
    assert losses["foreign"]["infonce"] < losses["none"]["infonce"] - 1e-6
    assert losses["foreign"]["kl"] == losses["none"]["kl"]
    assert losses["absent"] == losses["none"]


def test_embeddings_come_back_in_order_for_any_chunks(student_folder):
    student, rows = _student(student_folder), _rows()
    queries, passages = [[rows[f"{kind}{n}"] for n in range(9)] for kind in "qp"]
    expected = torch.cat([student.embed([row], "query") for row in [*queries, *passages]])
    for chunk_tokens in CHUNKS:
        found, _ = embed_shared(student, queries, passages, chunk_tokens=chunk_tokens)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_names_the_queries(student_folder):
    student = _student(student_folder)
    with torch.no_grad():
        next(student.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="q0"):
        _step(student, _batch(2), 60)
    assert all(gradient is None for gradient in _gradients(student).values())


def _rank(rank, folder, rendezvous, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    results = {}
    for chunk_tokens in CHUNKS:
        student = _student(folder)
        terms = _step(student, _batch(6), chunk_tokens)
        results["float32", chunk_tokens] = terms, _gradients(student)
        torch.set_default_dtype(torch.float64)
        double = DoubleStudent(folder)
        terms = _step(double, _batch(6), chunk_tokens)
        results["float64", chunk_tokens] = terms, _gradients(double)
        torch.set_default_dtype(torch.float32)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(student_folder, tmp_path_factory):
    """Loss and gradients of the same step on every one of three processes."""
    out = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, (student_folder, out / "rendezvous", out), nprocs=RANKS)
    return [torch.load(out / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_several_processes_compute_the_step_of_one(ranks, student_folder, chunk_tokens):
    one = _student(student_folder)
    terms = _step(one, _batch(6), chunk_tokens)
    for rank in ranks:
        theirs, gradients = rank["float32", chunk_tokens]
        assert _terms(theirs) == _terms(terms)  # the same embeddings to the last bit
        _same(_used(gradients), _used(_gradients(one)), relative=1e-5)
        first = ranks[0]["float32", chunk_tokens][1]
        assert all(torch.equal(first[name], g) for name, g in _used(gradients).items())


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_several_processes_compute_the_step_of_one_in_float64(ranks, student_folder, float64, chunk_tokens):
    one = DoubleStudent(student_folder)
    _step(one, _batch(6), chunk_tokens)
    for rank in ranks:
        _same(_used(rank["float64", chunk_tokens][1]), _used(_gradients(one)), relative=1e-12)


def _used(gradients):
    """Without the parameters that the embedding does not depend on (BERT's pooler)."""
    return {name: gradient for name, gradient in gradients.items() if ".pooler." not in name}


@pytest.mark.slow
def test_parameters_that_one_process_leaves_alone_are_left_alone_by_several(ranks, student_folder):
    """No gradient, not a gradient of zeros: AdamW's weight decay would move them."""
    one = _student(student_folder)
    _step(one, _batch(6), 60)
    idle = {name for name, gradient in _gradients(one).items() if gradient is None}
    assert idle
    for rank in ranks:
        gradients = rank["float32", 60][1]
        assert {name for name, gradient in gradients.items() if gradient is None} == idle
