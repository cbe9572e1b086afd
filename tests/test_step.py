"""One training step = plain backward through the whole batch, for any chunks and any ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from retrieval_ray import objective
from retrieval_ray.balance import Balance, balance_loss
from retrieval_ray.config_file import load as load_config
from retrieval_ray.experts import add_experts
from retrieval_ray.moe import Layout, moe_layers, watch
from retrieval_ray.objective import Objective
from retrieval_ray.step import Lists, _dropout, embed_shared, training_step
from retrieval_ray.student import Student
from tests import oracles

OBJECTIVE = Objective(
    {"kl": 1.0, "infonce": 0.1, "infonce_list": 0.2, "margin_mse": 0.03, "ranking": 0.4, "clp": 0.5},
    student_temperature=0.05,
    teacher_temperature=0.3,
    infonce_temperature=0.02,
)
RANKS = 3
ROOT = Path(__file__).resolve().parents[1]
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
    teacher = rng.random((size, places)).round(1)  # some ties
    answered = [[*rng.choice(["q0", "q7", "q8", None], places - 1)] for _ in range(size)]
    return Lists([f"q{n}" for n in range(size)], lists, teacher, excluded, answered)


def _rows(seed=0):
    """Token rows of every query and passage, of different lengths."""
    rng = np.random.default_rng(seed)
    names = [*(f"q{n}" for n in range(9)), *(f"p{n}" for n in range(9))]
    return {
        name: np.array([2, *rng.integers(5, 261, rng.integers(2, 20)), 3], dtype=np.int64) for name in names
    }


def _step(student, batch, chunk_tokens, **more):
    rows = _rows()
    more = {"objective": OBJECTIVE, "chunk_tokens": chunk_tokens, **more}
    return training_step(student, batch, rows.__getitem__, rows.__getitem__, **more)


def _gradients(student):
    return {name: parameter.grad for name, parameter in student.model.named_parameters()}


def _naive(student, batch, embed=None):
    """The papers' loss: every list's passages encoded with it, again and again, in one graph.

    Likewise the negatives' queries.
    """
    rows = _rows()
    embed = embed or (lambda names, role: student.embed([rows[name] for name in names], role))
    queries = embed(batch.query_ids, "query").double()
    vectors = [embed(row, "passage").double() for row in batch.passage_ids]
    scores = torch.stack([own @ query for own, query in zip(vectors, queries, strict=True)])
    teacher = torch.from_numpy(batch.teacher_BK).double()
    left_out = [
        [p in excluded for p in row]
        for row, excluded in zip(batch.passage_ids, batch.excluded_ids, strict=True)
    ]
    own = [
        [
            None if name is None else embed([name], "query")[0].double() @ vector
            for name, vector in zip(names, row[1:], strict=True)
        ]
        for names, row in zip(batch.negative_query_ids, vectors, strict=True)
    ]
    kl = oracles.listwise_kl(scores, teacher, 0.05, 0.3)
    if batch.judged is not None:  # of each query, whatever of it any list of the batch holds
        there, each = {p for row in batch.passage_ids for p in row}, []
        for query, judged in zip(queries, batch.judged, strict=True):
            names = [p for p in judged if p in there]
            own_scores = torch.tensor([[judged[p] for p in names]]).double()
            each.append(
                oracles.listwise_kl((embed(names, "passage").double() @ query)[None], own_scores, 0.05, 0.3)
            )
        kl = torch.stack(each).mean()
    terms = {
        "kl": kl,
        "infonce": oracles.infonce(queries, vectors, batch.passage_ids, batch.excluded_ids, 0.02),
        "infonce_list": oracles.infonce_list(scores, left_out, 0.02),
        "margin_mse": oracles.margin_mse(scores, teacher, 0.05, 0.3),
        "ranking": oracles.ranking(scores, teacher, 0.05),
        "clp": oracles.clp(own),
    }
    loss = sum(OBJECTIVE.weights[name] * term for name, term in terms.items())
    loss.backward()
    return {**{name: term.item() for name, term in terms.items()}, "loss": loss.item()}


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


def _judged(batch, seed=0):
    """The batch, its lists drawn from longer ones: of 7 of the passages, and of one that no list holds."""
    rng = np.random.default_rng(seed)
    judged = []
    for row, scores in zip(batch.passage_ids, batch.teacher_BK, strict=True):
        others = [f"p{n}" for n in range(9) if f"p{n}" not in row][:3]
        more = dict(zip([*others, "elsewhere"], rng.random(4).tolist(), strict=True))
        judged.append(dict(zip(row, scores.tolist(), strict=True)) | more)
    return replace(batch, judged=judged)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_of_lists_that_were_drawn_the_kl_takes_all_that_the_batch_holds(student_folder, float64, size):
    batch = _judged(_batch(size))
    ours, plain, short = (DoubleStudent(student_folder) for _ in range(3))
    terms, expected = _step(ours, batch, 60), _naive(plain, batch)
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    _same(_gradients(ours), _gradients(plain), relative=1e-10)
    alone = _step(short, _batch(size), 60)
    assert (terms["kl"] == pytest.approx(alone["kl"])) == (size == 1)  # alone, it holds its own list


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
    alone = replace(OBJECTIVE, weights={"infonce": 1.0})  # no queries of negatives in the chunks
    assert _step(student, batch, 60, objective=alone)["infonce"] == pytest.approx(expected.item(), rel=1e-11)


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
    weighted = sum(weight * terms[name] for name, weight in OBJECTIVE.weights.items())
    assert terms["loss"] == pytest.approx(weighted)
    assert terms["passages"] == 6 * 4
    passages = {passage for row in batch.passage_ids for passage in row}
    queries = {*batch.query_ids, *(q for row in batch.negative_query_ids for q in row if q)}
    assert len(queries) < 6 + sum(q is not None for row in batch.negative_query_ids for q in row)
    assert terms["encoded"] == len(passages)
    assert terms["tokens"] == sum(len(_rows()[name]) for name in passages | queries)


def test_a_term_without_weight_is_not_computed(student_folder):
    batch, off = _batch(6), {"kl": 1.0, "infonce": 0.0, "clp": 0.0}
    terms = _step(_student(student_folder), batch, 60, objective=replace(OBJECTIVE, weights=off))
    assert {"infonce", "clp"}.isdisjoint(terms) and terms["loss"] == terms["kl"]
    passages = {passage for row in batch.passage_ids for passage in row}
    read = [*batch.query_ids, *passages]  # not the negatives' queries
    assert terms["tokens"] == sum(len(_rows()[name]) for name in read)
    with pytest.raises(ValueError, match="known: kl, infonce"):
        replace(OBJECTIVE, weights={"hinge": 1.0})


def test_clp_without_the_negatives_queries_is_an_error_and_with_none_is_zero(student_folder):
    alone = replace(OBJECTIVE, weights={"clp": 1.0})
    batch = replace(_batch(2), negative_query_ids=None)
    with pytest.raises(ValueError, match="negative_query_ids"):
        _step(_student(student_folder), batch, 60, objective=alone)
    student, none = _student(student_folder), replace(batch, negative_query_ids=[[None] * 3] * 2)
    assert _step(student, none, 60, objective=alone)["loss"] == 0
    assert all(g is None or not g.any() for g in _gradients(student).values())


@pytest.mark.parametrize("size", [1, 4])
def test_the_released_form_of_clp_is_the_published_loss(student_folder, float64, size):
    """configs/clp.yaml's terms against the published code's loop; a batch of one is what that code can do."""
    train = load_config(str(ROOT / "configs" / "clp.yaml")).train
    released = Objective(vars(train.terms), 0.05, 0.3, train.infonce_temperature)
    batch = replace(_batch(size), excluded_ids=[[]] * size)
    own = [[q or "q8" for q in row] for row in batch.negative_query_ids]
    batch = replace(batch, negative_query_ids=own)
    ours, plain, rows = DoubleStudent(student_folder), DoubleStudent(student_folder), _rows()
    terms = _step(ours, batch, 60, objective=released)

    def cosine(query, passage):
        return plain.embed([rows[query]], "query")[0] @ plain.embed([rows[passage]], "passage")[0]

    loss = oracles.released_clp(
        [[cosine(q, p) for p in row] for q, row in zip(batch.query_ids, batch.passage_ids, strict=True)],
        [
            [cosine(q, p) for q, p in zip(own, row[1:], strict=True)]
            for own, row in zip(batch.negative_query_ids, batch.passage_ids, strict=True)
        ],
        penalty=0.1,
    )
    loss.backward()
    assert terms["loss"] == pytest.approx(loss.item(), rel=1e-10)
    _same(_gradients(ours), _gradients(plain), relative=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_loss_in_blocks_of_queries_is_the_loss_at_once(student_folder, float64, monkeypatch, rows):
    """Blocks of 1, 2 and 4 of 6 queries: the last one is short."""
    whole, blocks = DoubleStudent(student_folder), DoubleStudent(student_folder)
    expected = _step(whole, _judged(_batch(6)), 60)
    monkeypatch.setattr(objective, "_BLOCK_QUERIES", rows)
    assert _step(blocks, _judged(_batch(6)), 60) == pytest.approx(expected, rel=1e-12)
    _same(_gradients(blocks), _gradients(whole), relative=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_seed", [None, (7, 3)])
def test_graphs_that_are_kept_change_no_bit(student_folder, precision, dropout_seed):
    results = []
    for keep_bytes in (0, 400_000, 10**9):
        student = Student(student_folder, precision=precision, device="cpu")
        terms = _step(student, _batch(6), 60, keep_bytes=keep_bytes, dropout_seed=dropout_seed)
        results.append((terms, _gradients(student)))
    for terms, gradients in results[1:]:
        assert terms == results[0][0]
        assert all(g is None or torch.equal(g, results[0][1][name]) for name, g in gradients.items())


def test_dropout_draws_the_same_masks_in_both_passes(student_folder, float64):
    """A chunk a text, so that the plain graph can draw each text's masks too."""
    batch, ours, plain = _batch(6), DoubleStudent(student_folder), DoubleStudent(student_folder)
    outer = torch.get_rng_state()
    terms = _step(ours, batch, 1, dropout_seed=(7, 3))
    assert torch.equal(torch.get_rng_state(), outer) and not ours.model.training
    assert _step(DoubleStudent(student_folder), batch, 1, dropout_seed=(7, 4))["loss"] != terms["loss"]

    rows = _rows()
    queries = list(dict.fromkeys([*batch.query_ids, *(q for r in batch.negative_query_ids for q in r if q)]))
    passages = list(dict.fromkeys(p for row in batch.passage_ids for p in row))
    number = {}
    for names in (queries, passages):  # chunks are numbered from the longest text, queries first
        for name in sorted(names, key=lambda name: -len(rows[name])):
            number[name] = len(number)

    def embed(names, role):
        found = []
        for name in names:
            with _dropout(plain, (7, 3, number[name])):
                found.append(plain.embed([rows[name]], role)[0])
        return torch.stack(found)

    expected = _naive(plain, batch, embed)
    assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    _same(_gradients(ours), _gradients(plain), relative=1e-10)
    without = _step(DoubleStudent(student_folder), batch, 1)
    assert abs(without["loss"] - terms["loss"]) > 1e-3


def _experts(folder, k=1):
    """A student whose experts differ, so that routing matters."""
    student = _student(folder)
    add_experts(student.model, Layout(4, k), seed=1)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in moe_layers(student.model[0].auto_model).values():
            layer.weight_EOI += 0.3 * torch.randn_like(layer.weight_EOI)
            layer.router_EI += torch.randn_like(layer.router_EI)
    return student


def _balance(student, jitter=0.0, weight=0.7):
    return Balance(student.model[0].auto_model, weight, jitter=jitter, seed=(7, 3))


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_of_experts_is_the_whole_batchs_for_any_chunks(student_folder, k, chunk_tokens):
    """Against one graph: the plain loss, and the balance over every different text once."""
    batch, ours, plain = _batch(6), _experts(student_folder, k), _experts(student_folder, k)
    balance = _balance(ours)
    terms = _step(ours, batch, chunk_tokens, balance=balance)

    expected = _naive(plain, batch)
    rows = _rows()
    queries = {*batch.query_ids, *(q for row in batch.negative_query_ids for q in row if q)}
    passages = {passage for row in batch.passage_ids for passage in row}
    with watch(plain.model[0].auto_model) as seen:
        for names, role in ((queries, "query"), (passages, "passage")):
            plain.embed([rows[name] for name in sorted(names)], role)
        routing = seen()
    alone = balance_loss(routing)
    (0.7 * alone).backward()
    assert terms["balance"] == pytest.approx(float(alone.detach()), rel=1e-5)
    assert terms["loss"] == pytest.approx(expected["loss"] + 0.7 * terms["balance"], rel=1e-5)
    _same(_gradients(ours), _gradients(plain), relative=1e-4)
    assert torch.equal(balance.routing.counts_LE, routing.counts_LE)
    routers = [g for name, g in _gradients(ours).items() if name.endswith("router_EI")]
    without = _experts(student_folder, k)
    assert "balance" not in _step(without, batch, chunk_tokens, balance=_balance(without, weight=0.0))
    others = [g for name, g in _gradients(without).items() if name.endswith("router_EI")]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(routers, others, strict=True))


@pytest.mark.parametrize("dropout_seed", [None, (7, 3)])
def test_jitter_is_the_same_in_both_passes(student_folder, dropout_seed):
    """Graphs kept and chunks embedded again have the same gradients, to the last bit."""
    results = []
    for keep_bytes in (0, 10**9):
        student = _experts(student_folder)
        more = {"dropout_seed": dropout_seed, "balance": _balance(student, jitter=0.5)}
        terms = _step(student, _batch(6), 60, keep_bytes=keep_bytes, **more)
        results.append((terms, _gradients(student)))
    (terms, kept), (again, cached) = results
    assert terms == again
    assert all(g is None or torch.equal(g, cached[name]) for name, g in kept.items())
    still = _experts(student_folder)
    assert _step(still, _batch(6), 60, dropout_seed=dropout_seed)["loss"] != terms["loss"]


@settings(max_examples=15)
@given(
    size=st.integers(1, 5),
    places=st.integers(2, 4),
    passages=st.integers(4, 9),
    seed=st.integers(0, 99),
    chunk_tokens=st.integers(1, 300),
    keep_bytes=st.sampled_from([0, 100_000, 10**9]),
)
def test_any_batch_any_cut_and_any_budget_give_the_plain_gradient(student_folder, **drawn):
    torch.set_default_dtype(torch.float64)
    try:
        chunks = {name: drawn.pop(name) for name in ("chunk_tokens", "keep_bytes")}
        batch, ours, plain = _batch(**drawn), DoubleStudent(student_folder), DoubleStudent(student_folder)
        terms, expected = _step(ours, batch, **chunks), _naive(plain, batch)
        assert {name: terms[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
        _same(_gradients(ours), _gradients(plain), relative=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_excluded_ids_are_masked_over_the_whole_batch(student_folder):
    """A passage that only other lists hold is left out of a query's InfoNCE, and KL is not touched."""
    batch = _batch(3, passages=9, seed=1)
    own = set(batch.passage_ids[0])
    foreign = sorted({p for row in batch.passage_ids for p in row} - own)
    assert foreign
    losses = {}
    for name, left_out in (("none", []), ("foreign", foreign), ("absent", ["not in the batch"])):
        lists = replace(batch, excluded_ids=[left_out, [], []])
        losses[name] = _step(_student(student_folder), lists, 60)
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


def test_chunks_come_in_few_shapes(student_folder):
    """Widths are multiples of 8 up to the student's limit, and a width that is full has one height."""
    student, rng = _student(student_folder), np.random.default_rng(0)
    limit = student.max_tokens["passage"]
    lengths = [limit - 1, *rng.integers(2, 41, 200)]
    texts = [np.full(length, 7) for length in lengths]
    shapes = []
    student.model[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0]["input_ids"].shape))
    student.model.max_seq_length = limit - 1  # no multiple of 8: what is longer may have no place
    embed_shared(student, texts[:1], texts[1:], chunk_tokens=240)
    assert shapes[0] == (1, limit - 1)
    assert {width % 8 for _, width in shapes[1:]} == {0}
    assert len(set(shapes[1:-1])) == len({width for _, width in shapes[1:-1]}) <= 5
    single = torch.cat(
        [student.model(student._features([text], "passage"))["sentence_embedding"] for text in texts]
    )
    found, _ = embed_shared(student, texts[:1], texts[1:], chunk_tokens=240)
    torch.testing.assert_close(found, normalize(single, dim=-1).detach(), atol=1e-5, rtol=0)


def test_a_loss_that_is_not_finite_names_the_queries(student_folder):
    student = _student(student_folder)
    with torch.no_grad():
        next(student.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="q0"):
        _step(student, _batch(2), 60)
    assert all(gradient is None for gradient in _gradients(student).values())


@pytest.mark.parametrize("where", ["query", "passage", "own"])
def test_a_gradient_that_is_not_finite_names_the_queries(student_folder, monkeypatch, where):
    """A query's own, those with a passage in their list, and those of whose negatives it is the query."""
    from retrieval_ray import step as module

    batch = replace(_batch(6), negative_query_ids=[["q7", None, None], *[[None] * 3] * 5])
    unique = sorted({p for row in batch.passage_ids for p in row})
    true = module.loss_and_gradient

    def broken(objective, embeddings, held):
        values, gradient_MD = true(objective, embeddings, held)
        at = {"query": 4, "own": 6, "passage": 7 + int(held.index_BK[1, 2])}[where]  # 6 queries, and q7
        gradient_MD[at] = torch.nan
        return values, gradient_MD

    monkeypatch.setattr(module, "loss_and_gradient", broken)
    passage = batch.passage_ids[1][2]
    expected = {"query": ["q4"], "own": ["q0"]}.get(
        where, [q for q, row in zip(batch.query_ids, batch.passage_ids, strict=True) if passage in row][:5]
    )
    with pytest.raises(module.NotFinite, match="the gradient of queries") as error:
        _step(_student(student_folder), batch, 100_000)
    assert error.value.query_ids == expected and len(unique) == 9


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
        dropping = DoubleStudent(folder)
        terms = _step(dropping, _batch(6), chunk_tokens, keep_bytes=300_000 * rank, dropout_seed=(7, 3))
        results["dropout", chunk_tokens] = terms, _gradients(dropping)
        torch.set_default_dtype(torch.float32)
        balanced = _experts(folder)
        balance = _balance(balanced, jitter=0.5)
        terms = _step(balanced, _batch(6), chunk_tokens, keep_bytes=300_000 * rank, balance=balance)
        results["experts", chunk_tokens] = terms, _gradients(balanced)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(student_folder, tmp_path_factory):
    """Loss and gradients of the same step on every one of three processes.

    They are forked from one that has imported everything: importing takes most of their time.
    """
    out = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__, "sentence_transformers.sentence_transformer.modules"])
    arguments = (student_folder, out / "rendezvous", out)
    multiprocessing.start_processes(_rank, arguments, nprocs=RANKS, start_method="forkserver")
    return [torch.load(out / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_several_processes_compute_the_step_of_one(ranks, student_folder, chunk_tokens):
    one = _student(student_folder)
    terms = _step(one, _batch(6), chunk_tokens)
    for rank in ranks:
        theirs, gradients = rank["float32", chunk_tokens]
        assert theirs == terms  # the same embeddings to the last bit
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


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_several_processes_drop_what_one_drops(ranks, student_folder, float64, chunk_tokens):
    one = DoubleStudent(student_folder)
    _step(one, _batch(6), chunk_tokens, dropout_seed=(7, 3))
    for rank in ranks:
        _same(_used(rank["dropout", chunk_tokens][1]), _used(_gradients(one)), relative=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_several_processes_balance_what_one_balances(ranks, student_folder, chunk_tokens):
    one = _experts(student_folder)
    terms = _step(one, _batch(6), chunk_tokens, balance=_balance(one, jitter=0.5))
    for rank in ranks:
        theirs, gradients = rank["experts", chunk_tokens]
        assert theirs == pytest.approx(terms, rel=1e-12)
        _same(_used(gradients), _used(_gradients(one)), relative=1e-4)


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
