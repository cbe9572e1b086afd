"""Students of other architectures than BERT, against sentence-transformers itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from retrieval_ray.objective import Objective
from retrieval_ray.step import Lists, training_step
from retrieval_ray.student import Student
from tests import oracles
from tests.families import FAMILIES, INSTRUCTION, SPECIAL, TOKENS, texts_of_any_length


@pytest.fixture(params=FAMILIES)
def folder(request, make_family):
    return make_family(request.param)


@pytest.fixture(scope="module")
def texts(words):
    return texts_of_any_length(words)


def _student(folder, **more):
    return Student(folder, precision="float32", device="cpu", **more)


def _sentence_transformer(folder):
    """sentence-transformers alone, given what pads where there is nothing: without it, it cannot encode."""
    model = SentenceTransformer(folder, device="cpu")
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = "<unk>"
    return model


def _plain(folder, texts, role):
    model = _sentence_transformer(folder)
    prompt = "query" if role == "query" and model.prompts.get("query") else None
    return model.encode(texts, prompt_name=prompt, normalize_embeddings=True, batch_size=7)


@pytest.mark.parametrize("role", ["query", "passage"])
def test_encode_is_sentence_transformers_own(folder, texts, role):
    expected = _plain(folder, texts, role)
    for budget in (1, 100, 100_000):
        vectors = _student(folder).encode(texts, role, token_budget=budget)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_the_instruction_does_something(make_family, texts):
    student = _student(make_family("decoder, padded left"))
    query, passage = (student.encode(texts, role, token_budget=500) for role in ("query", "passage"))
    assert np.abs(query - passage).max() > 0.01


def _lists(texts):
    rng = np.random.default_rng(1)
    passages = [[f"p{n}" for n in rng.choice(8, 4, replace=False)] for _ in range(5)]
    return Lists([f"q{n}" for n in range(5)], passages, rng.random((5, 4)), [[p[2]] for p in passages])


def test_a_step_is_the_gradient_of_a_plain_padded_batch(folder, texts):
    """Every list encoded as one padded batch by sentence-transformers, in one graph."""
    lists = _lists(texts)
    queries = {f"q{n}": texts[n] for n in range(5)}
    passages = {f"p{n}": texts[5 + n] for n in range(8)}
    student, plain = _student(folder), _sentence_transformer(folder)
    objective = Objective({"kl": 1.0, "infonce": 0.1}, 0.05, 0.3, 0.02)
    rows = {key: row for role, some in (("query", queries), ("passage", passages)) for key, row in
            zip(some, student.tokenize(list(some.values()), role), strict=True)}  # fmt: skip
    terms = training_step(
        student, lists, rows.__getitem__, rows.__getitem__, objective, chunk_tokens=60, keep_bytes=10_000
    )

    def embed(some, prompt):
        plain.eval()
        features = plain.preprocess(some, prompt=prompt or None)
        return normalize(plain(features)["sentence_embedding"], dim=-1).double()

    queries_BD = embed([queries[q] for q in lists.query_ids], plain.prompts.get("query"))
    vectors = [embed([passages[p] for p in row], None) for row in lists.passage_ids]
    scores_BK = torch.stack([own @ query for own, query in zip(vectors, queries_BD, strict=True)])
    kl = oracles.listwise_kl(scores_BK, torch.from_numpy(lists.teacher_BK), 0.05, 0.3)
    infonce = oracles.infonce(queries_BD, vectors, lists.passage_ids, lists.excluded_ids, 0.02)
    (kl + 0.1 * infonce).backward()
    assert terms["kl"] == pytest.approx(kl.item(), rel=1e-4)
    ours = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-3
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) <= 2e-5 * largest, name


def test_trained_and_saved_it_is_loaded_by_plain_sentence_transformers(folder, texts, tmp_path):
    student = _student(folder)
    before = student.encode(texts, "query", token_budget=200)
    student.embed(student.tokenize(texts[:4], "query"), "query")[:, 0].sum().backward()
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    vectors = {role: student.encode(texts, role, token_budget=200) for role in ("query", "passage")}
    assert np.abs(vectors["query"] - before).max() > 1e-3
    student.save(str(tmp_path / "saved"))
    again, plain = _student(str(tmp_path / "saved")), SentenceTransformer(str(tmp_path / "saved"))
    assert again.prompts == student.prompts
    theirs = {"query": plain.encode_query(texts), "passage": plain.encode_document(texts)}  # in batches
    for role, expected in vectors.items():
        assert np.array_equal(again.encode(texts, role, token_budget=200), expected)
        np.testing.assert_allclose(theirs[role], expected, atol=1e-5)
    assert not list(Path(tmp_path).rglob("*.bin"))


@pytest.mark.parametrize("role", ["query", "passage"])
def test_token_vectors_are_of_the_texts_own_tokens(make_family, texts, role):
    """Neither the instruction nor what ends a text, but read after the instruction."""
    folder = make_family("decoder, padded left")
    plain, prompt = SentenceTransformer(folder, device="cpu"), INSTRUCTION if role == "query" else ""
    found = _student(folder).token_vectors(texts, role, token_budget=150)
    for text, vectors in zip(texts, found, strict=True):
        with torch.no_grad():
            states = plain[0](plain.preprocess([prompt + text]))["token_embeddings"][0]
        expected = normalize(states[len(prompt.split()) : -1], dim=-1)
        assert len(expected) == len(text.split())
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)


def test_a_text_is_cut_where_positions_end(words, make_family, tmp_path):
    """XLM-R's config counts two positions that no text can have; its tokenizer may promise any number."""
    folder, text = make_family("xlm-r"), " ".join(words[: 3 * TOKENS])
    with pytest.raises((IndexError, RuntimeError)):
        SentenceTransformer(folder, device="cpu").encode(text)
    student = _student(folder)
    (row,) = student.tokenize([text], "passage")
    assert len(row) == TOKENS and row[-1] == SPECIAL.index("</s>")
    vectors = student.encode([text], "passage", token_budget=100)
    student.save(str(tmp_path))
    np.testing.assert_allclose(_plain(str(tmp_path), [text], "passage"), vectors, atol=1e-5)


@pytest.mark.parametrize("family", ["modernbert", "decoder, padded left"])
def test_a_long_text_is_cut_at_the_models_own_limit(words, make_family, family):
    text = " ".join(words[: 3 * TOKENS])
    (row,) = _student(make_family(family)).tokenize([text], "query")
    assert len(row) == TOKENS and row[-1] == SPECIAL.index("</s>")  # what the last token pools is kept


def test_the_attention_of_training_gives_the_same_vectors(folder, texts):
    """Another kernel, chosen on CPUs in bf16; sliding windows and causal masks stay."""
    exact = _student(folder).encode(texts, "query", token_budget=200)
    student = Student(folder, precision="bfloat16", device="cpu")
    student.prepare_training()
    assert student.model[0].auto_model.config._attn_implementation == "eager"
    student.precision = "float32"  # so that the kernel alone differs
    vectors = student.encode(texts, "query", token_budget=200)
    np.testing.assert_allclose(vectors, exact, atol=1e-5)
