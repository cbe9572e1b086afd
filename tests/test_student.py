"""The student against sentence-transformers itself: same tokens, prompts, pooling and vectors."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling, Transformer

from retrieval_ray.errors import UserError
from retrieval_ray.student import Student, default_chunk_tokens, probe_precision

BUDGETS = [1, 50, 400, 100_000]
PROMPTS = {"query": "find: ", "document": "text here: "}


@pytest.fixture(scope="module")
def texts(words):
    rng = np.random.default_rng(0)
    made = [" ".join(rng.choice(words, length)) for length in rng.integers(1, 70, 40)]  # some cut
    return [*made, "", "   ", "Unknown Wörter, 漢字!", made[0], made[0].upper()]


def _student(folder, **more):
    return Student(folder, precision="float32", device="cpu", **more)


def _plain(folder, texts, prompt=None):
    model = SentenceTransformer(folder, device="cpu")
    return model.encode(texts, prompt=prompt, normalize_embeddings=True, batch_size=7)


@pytest.mark.parametrize("budget", BUDGETS)
def test_encode_is_sentence_transformers_own(student_folder, texts, budget):
    vectors = _student(student_folder).encode(texts, "passage", token_budget=budget)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, _plain(student_folder, texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_and_pooling_of_the_model_are_respected(make_student, texts, include_prompt, mode):
    folder = make_student(include_prompt=include_prompt, prompts=PROMPTS, mode=mode)
    student = _student(folder)
    for role, prompt in (("query", "find: "), ("passage", "text here: ")):
        vectors = student.encode(texts, role, token_budget=300)
        expected = _plain(folder, texts, prompt)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert np.abs(expected - _plain(folder, texts)).max() > 0.01  # the prompt does something


def test_the_users_prompt_goes_before_the_models(make_student, texts):
    folder = make_student(prompts=PROMPTS)
    student = _student(folder, query_prompt="ask ", passage_prompt="")
    for role, prompt in (("query", "ask "), ("passage", None)):
        np.testing.assert_allclose(
            student.encode(texts, role, token_budget=300), _plain(folder, texts, prompt), atol=1e-5
        )


def test_a_model_that_is_saved_truncated_stays_truncated(make_student, texts, tmp_path):
    """sentence-transformers 6 keeps ``truncate_dim`` in the model's folder."""
    folder = make_student(truncate_dim=16)
    student = _student(folder)
    assert student.dimension == 16
    vectors = student.encode(texts, "query", token_budget=300)
    np.testing.assert_allclose(vectors, _plain(folder, texts), atol=1e-5)
    student.save(str(tmp_path / "saved"))
    np.testing.assert_allclose(_plain(str(tmp_path / "saved"), texts), vectors, atol=1e-5)


def test_roles_have_their_own_limit(student_folder, words):
    student = _student(student_folder, max_query_tokens=8, max_passage_tokens=20)
    text = " ".join(words[:60])
    assert len(student.tokenize([text], "query")[0]) == 8
    assert len(student.tokenize([text], "passage")[0]) == 20
    assert len(student.tokenize([text], "passage", limit=12)[0]) == 12
    assert len(student.tokenize([text], "passage", limit=30)[0]) == 20  # lowers, never raises
    assert student.model.max_seq_length == 48  # the saved model is not cut to a role
    assert len(_student(student_folder).tokenize([text], "query")[0]) == 48  # the model's own
    above = _student(student_folder, max_query_tokens=500)
    assert len(above.tokenize([text], "query")[0]) == 48


def test_vectors_do_not_depend_on_the_other_texts(student_folder, texts):
    student = _student(student_folder)
    together = student.encode(texts, "query", token_budget=200)
    alone = np.concatenate([student.encode([text], "query", token_budget=200) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert student.encode([], "query", token_budget=200).shape == (0, 32)


def test_more_texts_than_one_tokenizer_block_keep_their_order(student_folder, words):
    student = _student(student_folder)
    texts = [f"{words[n % 256]} {words[n // 256]}" for n in range(600)]
    rows = student.tokenize(texts, "query")
    for n in (0, 255, 256, 511, 599):
        assert rows[n].tolist() == student.tokenize([texts[n]], "query")[0].tolist()


@pytest.mark.parametrize("knows", ["all options", "other options", "none"])
def test_tokens_are_the_same_whatever_options_the_models_first_module_knows(
    make_student, texts, monkeypatch, knows
):
    """A module of the model's own may pad all the same, or take no such options at all."""
    folder = make_student()
    expected = SentenceTransformer(folder, device="cpu").preprocess(texts)
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    ]
    whole = Transformer.preprocess
    if knows == "other options":
        monkeypatch.setattr(
            Transformer, "preprocess", lambda self, inputs, prompt=None, **_: whole(self, inputs, prompt)
        )
    elif knows == "none":
        monkeypatch.setattr(
            Transformer, "preprocess", lambda self, inputs, prompt=None: whole(self, inputs, prompt)
        )
    student = _student(folder)
    assert [row.tolist() for row in student.tokenize(texts, "passage")] == rows


def test_texts_packed_into_one_row_are_the_users_error(make_student, texts, monkeypatch):
    student = _student(make_student())
    packed = {"input_ids": [[2, 5, 3, 2, 6, 3]]}
    monkeypatch.setattr(student.model, "preprocess", lambda *_, **__: packed)
    with pytest.raises(UserError, match="packs several texts"):
        student.tokenize(texts[:2], "query")


@pytest.mark.parametrize("include_prompt", [True, False])
def test_tokens_made_elsewhere_give_the_same_vectors(make_student, texts, include_prompt):
    """A worker may get rows that another process tokenised."""
    folder = make_student(include_prompt=include_prompt, prompts=PROMPTS)
    first, fresh = _student(folder), _student(folder)
    rows = first.tokenize(texts, "query")
    np.testing.assert_allclose(
        fresh.encode_tokens(rows, "query", token_budget=300),
        first.encode_tokens(rows, "query", token_budget=300),
        atol=1e-6,
    )


def test_embed_has_a_graph_and_encode_has_none(student_folder, texts):
    student = _student(student_folder)
    rows = student.tokenize(texts[:3], "query")
    vectors = student.embed(rows, "query")
    assert vectors.requires_grad and vectors.dtype == torch.float32
    again = student.encode_tokens(rows, "query", token_budget=10_000)
    np.testing.assert_allclose(vectors.detach().numpy(), again, atol=1e-6)
    assert torch.equal(vectors, student.embed(rows, "query"))  # no dropout


@pytest.mark.parametrize(("precision", "plain"), [("float32", False), ("bfloat16", True)])
def test_training_changes_the_attention_but_neither_vectors_nor_the_saved_model(
    student_folder, texts, tmp_path, precision, plain
):
    student = Student(student_folder, precision=precision, device="cpu")
    before, config = student.encode(texts, "query", token_budget=300), student.model[0].auto_model.config
    usual = config._attn_implementation
    student.prepare_training()
    assert usual != "eager" and config._attn_implementation == ("eager" if plain else usual)
    after = student.encode(texts, "query", token_budget=300)
    np.testing.assert_allclose(after, before, atol=0.03 if plain else 0)
    student.save(str(tmp_path / "saved"))
    again = _student(str(tmp_path / "saved"))
    assert again.model[0].auto_model.config._attn_implementation == usual
    assert "eager" not in (tmp_path / "saved/config.json").read_text()


@pytest.mark.parametrize(("precision", "apart"), [("bfloat16", 0.1), ("float16", 0.01)])
def test_half_precision_is_near_and_leaves_the_weights_in_float32(student_folder, texts, precision, apart):
    student = Student(student_folder, precision=precision, device="cpu")
    vectors = student.encode(texts, "query", token_budget=300)
    exact = _student(student_folder).encode(texts, "query", token_budget=300)
    assert 0 < np.abs(vectors - exact).max() < apart
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}


def test_what_encodes_in_float16_trains_in_float32(student_folder, texts):
    student = Student(student_folder, precision="float16", device="cpu")
    rows = student.tokenize(texts, "query")
    half = student.embed(rows, "query").detach().numpy()
    student.prepare_training()
    exact = _student(student_folder)
    vectors = student.embed(rows, "query").detach().numpy()
    assert np.array_equal(vectors, exact.embed(rows, "query").detach().numpy())
    assert 0 < np.abs(vectors - half).max() < 0.01


def test_vectors_that_are_not_finite_are_the_users_error(student_folder, texts):
    """Some models' numbers are too large for float16."""
    student = Student(student_folder, precision="float16", device="cpu")
    with torch.no_grad():
        student.model[0].auto_model.embeddings.LayerNorm.weight.mul_(1e5)
    with pytest.raises(UserError, match="not finite in float16.*compute.precision=float32"):
        student.encode(texts, "query", token_budget=300)


@pytest.mark.parametrize(
    ("bfloat16", "capability", "expected"),
    [(True, (8, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (6, 1), "float32")],
)
def test_a_gpu_computes_in_what_it_has_units_for(monkeypatch, bfloat16, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert probe_precision("cuda") == expected


def test_bfloat16_encodes_with_the_weights_as_they_are_now(student_folder, texts):
    """Its cast weights are not kept: between two calls a training step may change them."""
    student = Student(student_folder, precision="bfloat16", device="cpu")
    before = student.encode(texts, "query", token_budget=300)
    assert np.array_equal(student.encode(texts, "query", token_budget=300), before)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = student.encode(texts, "query", token_budget=300)
    exact = student.embed(student.tokenize(texts, "query"), "query").detach().numpy()
    assert np.abs(after - before).max() > 0.1
    assert (after * exact).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_kept_in_half_precision_are_trained_in_float32(student_folder, texts, tmp_path, dtype):
    SentenceTransformer(student_folder, device="cpu").to(dtype).save(str(tmp_path / "half"))
    student = _student(str(tmp_path / "half"))
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    vectors = student.encode(texts, "query", token_budget=300)
    np.testing.assert_allclose(vectors, _plain(student_folder, texts), atol=0.05)


def test_token_vectors_are_the_last_layer_without_special_tokens(student_folder, texts):
    student = _student(student_folder)
    plain = SentenceTransformer(student_folder, device="cpu")
    for budget in BUDGETS:
        found = student.token_vectors(texts, "passage", token_budget=budget)
        for n in (0, 5, 42, 43):
            with torch.no_grad():
                features = plain.preprocess([texts[n]])
                states = plain[0](features)["token_embeddings"][0]
            # 1 is [UNK], 2 and 3 begin and end a text
            kept = [token > 4 for token in features["input_ids"][0].tolist()]
            expected = torch.nn.functional.normalize(states[kept], dim=-1)
            torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=0)


PROJECTED = ["tokens", "before pooling", "ColBERT", "MultiVectorEncoder", "SentenceTransformer", "stanford"]


@pytest.mark.parametrize("kind", PROJECTED)
def test_token_vectors_go_through_the_projection_of_tokens(bert_folder, texts, tmp_path, kind):
    """As in ColBERT checkpoints; PyLate's name for the layer is read without PyLate."""
    of = "token_embeddings" if kind in ("tokens", "MultiVectorEncoder") else "sentence_embedding"
    torch.manual_seed(0)
    dense = Dense(32, 8, bias=False, activation_function=torch.nn.Identity(), module_input_name=of)
    modules = [Transformer(bert_folder), dense]
    if kind == "stanford":
        shutil.copytree(bert_folder, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
        weights = load_file(tmp_path / "model.safetensors") | {"linear.weight": dense.linear.weight.detach()}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path), create_model_card=False)
        described = json.loads((tmp_path / "modules.json").read_text())
        if kind in ("ColBERT", "SentenceTransformer"):
            described[1]["type"] = "pylate.models.Dense.Dense"
        if kind == "before pooling":
            pooling = {"name": "2", "path": "2_Pooling", "type": "sentence_transformers.models.Pooling"}
            described[2:] = [{"idx": 2, **pooling}]
            (tmp_path / "2_Pooling").mkdir()
            Pooling(8).save(str(tmp_path / "2_Pooling"))
        (tmp_path / "modules.json").write_text(json.dumps(described))
        if kind in ("ColBERT", "MultiVectorEncoder"):
            (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": kind}))
    student = _student(str(tmp_path))
    (found,) = student.token_vectors(texts[:1], "passage", token_budget=300)
    plain = _student(bert_folder, passage_prompt=student.prompts["passage"])
    (states,) = plain.token_vectors(texts[:1], "passage", token_budget=300)  # of length 1
    expected = torch.nn.functional.normalize(states.clone() @ dense.linear.weight.T, dim=-1)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)


def test_what_else_is_done_with_tokens_is_refused_by_late_interaction_and_what_follows_pooling_is_not(
    bert_folder, tmp_path
):
    first, pooling, layer = Transformer(bert_folder), Pooling(32), LayerNorm(32)
    for name, modules in (("before", [first, layer]), ("after", [first, pooling, layer, Dense(32, 8)])):
        folder = str(tmp_path / name)
        SentenceTransformer(modules=modules, device="cpu").save(folder, create_model_card=False)
    assert len(_student(str(tmp_path / "after")).token_vectors(["silk"], "query", token_budget=64)) == 1
    with pytest.raises(UserError, match="LayerNorm"):
        _student(str(tmp_path / "before")).token_vectors(["silk"], "query", token_budget=64)


def test_a_text_without_words_keeps_its_special_tokens(student_folder):
    (vectors,) = _student(student_folder).token_vectors([""], "passage", token_budget=100)
    assert vectors.shape == (2, 32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_saved_and_loaded_by_plain_sentence_transformers(
    make_student, texts, tmp_path, normalize, include_prompt
):
    student = _student(
        make_student(include_prompt=include_prompt, normalize=normalize, mode="cls"),
        query_prompt="find: ",
        passage_prompt="text: ",
    )
    with torch.no_grad():
        next(student.model.parameters()).mul_(1.1)
    before = {role: student.encode(texts, role, token_budget=300) for role in ("query", "passage")}
    student.save(str(tmp_path / "saved"))
    again, plain = _student(str(tmp_path / "saved")), SentenceTransformer(str(tmp_path / "saved"))
    assert again.prompts == {"query": "find: ", "passage": "text: "}
    theirs = {"query": plain.encode_query(texts), "passage": plain.encode_document(texts)}
    for role, vectors in before.items():
        assert np.array_equal(again.encode(texts, role, token_budget=300), vectors)
        np.testing.assert_allclose(theirs[role], vectors, atol=1e-5)
        # still the same student after it was saved
        assert np.array_equal(student.encode(texts, role, token_budget=300), vectors)
    assert not list(tmp_path.rglob("*.bin"))


def test_prompts_switched_off_stay_off_in_the_saved_model(make_student, texts, tmp_path):
    student = _student(make_student(prompts=PROMPTS), query_prompt="", passage_prompt="")
    student.save(str(tmp_path / "saved"))
    again = _student(str(tmp_path / "saved"))
    assert again.prompts == {"query": "", "passage": ""}
    np.testing.assert_allclose(
        again.encode(texts, "query", token_budget=300),
        student.encode(texts, "query", token_budget=300),
        atol=1e-6,
    )


def test_a_model_with_a_default_prompt_can_be_loaded_after_saving(make_student, texts, tmp_path):
    folder = make_student(prompts={"query": "find: ", "passage": "text: "}, default_prompt_name="passage")
    student = _student(folder)
    np.testing.assert_allclose(
        student.encode(texts, "query", token_budget=300), _plain(folder, texts, "find: "), atol=1e-5
    )
    student.save(str(tmp_path / "saved"))
    assert _student(str(tmp_path / "saved")).prompts == {"query": "find: ", "passage": "text: "}


def test_what_is_no_model_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"student\.model"):
        _student(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("config.json", lambda content: content[:20]),
        ("config.json", lambda content: b"null"),
        ("config.json", lambda content: content.replace(b'"hidden_size": 32', b'"hidden_size": 64')),
        ("modules.json", lambda content: b"[3]"),
        ("1_Pooling/config.json", lambda content: b'{"colour": "red"}'),
        ("model.safetensors", lambda content: content[: len(content) // 2]),
        ("model.safetensors", lambda content: b""),
    ],
)
def test_a_broken_model_folder_is_the_users_error(student_folder, tmp_path, name, spoil):
    shutil.copytree(student_folder, tmp_path / "model")
    file = tmp_path / "model" / name
    assert spoil(file.read_bytes()) != file.read_bytes()
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"student\.model: cannot load '.*model'"):
        _student(str(tmp_path / "model"))


@pytest.mark.parametrize(("experts", "tokens"), [(0, 2048), (2, 2048), (4, 4096), (8, 8192)])
def test_experts_get_enough_rows_of_a_chunk(experts, tokens):
    assert default_chunk_tokens("cpu", experts) == tokens
    assert default_chunk_tokens("cuda", experts) == 8192
