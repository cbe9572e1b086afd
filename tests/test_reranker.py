"""Training a cross-encoder: which pairs, that it learns, and that a killed training ends the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.reranker import Lesson, Settings, lessons, rerank, train

IDS = [f"p{n}" for n in range(12)]


@given(st.data())
def test_negatives_are_unjudged_deep_enough_and_all_different(data):
    qrels = data.draw(
        st.dictionaries(
            st.sampled_from(["q1", "q2", "q3"]),
            st.dictionaries(st.sampled_from(IDS), st.integers(0, 2), min_size=1),
        )
    )
    rankings = {q: data.draw(st.permutations(IDS)) for q in data.draw(st.permutations(sorted(qrels)))[:2]}
    skip, wanted = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    arguments = {"relevance_threshold": 1, "negatives": wanted, "skip": skip}
    found = lessons(qrels, rankings, seed=1, **arguments)
    for query in qrels:
        own = [lesson for lesson in found if lesson.query_id == query]
        relevant = {p for p, grade in qrels[query].items() if grade >= 1}
        known = qrels[query].keys() - relevant
        deep = {p for p in rankings.get(query, [])[skip:] if p not in qrels[query]}
        negatives = [p for lesson in own for p in lesson.negative_ids]
        assert len(set(negatives)) == len(negatives) == min(len(known | deep), wanted * len(relevant))
        assert set(negatives) <= known | deep
        assert known <= set(negatives) or set(negatives) <= known  # what was judged goes first
        assert [lesson.relevant_id for lesson in own] == sorted(relevant)[: len(negatives)]
        assert all(0 < len(lesson.negative_ids) <= wanted for lesson in own)
    alone = {q: lessons({q: qrels[q]}, rankings, seed=1, **arguments) for q in qrels}
    assert found == [lesson for q in sorted(qrels) for lesson in alone[q]]  # whatever the other queries are


def test_another_seed_draws_others():
    rankings = {"q": [f"p{n}" for n in range(100)]}
    arguments = {"relevance_threshold": 1, "negatives": 5, "skip": 0}
    one, other = (lessons({"q": {"p0": 1}}, rankings, seed=seed, **arguments)[0] for seed in (1, 2))
    assert one.relevant_id == other.relevant_id == "p0" and one.negative_ids != other.negative_ids
    assert isinstance(one, Lesson) and len(one.negative_ids) == 5


@pytest.fixture(scope="module")
def settings(bert_folder: str) -> Settings:
    return Settings(
        base=bert_folder, epochs=6, batch_lists=8, learning_rate=2e-3, warmup_share=0.1, max_tokens=32,
        checkpoint_seconds=1e9, seed=3, bfloat16=False, device="cpu", trust_remote_code=False,
    )  # fmt: skip


def _lists(words: list[str]) -> list[tuple[str, list[str]]]:
    """A passage answers any query if it begins with one certain word."""
    return [
        (words[n % 8], [f"{words[first]} {words[20 + n % 40]}" for first in (99, n % 16, (n + 5) % 16)])
        for n in range(80)
    ]


@pytest.mark.slow
def test_it_learns_is_saved_as_a_teacher_folder_and_a_killed_training_ends_the_same(
    settings: Settings, words: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    lists = _lists(words)
    steps: list[int] = []
    model = train(lists, settings, tmp_path / "one", on_step=lambda step, total: steps.append(step))
    assert steps == list(range(1, 61))

    class Killed(Exception): ...

    def until(step: int, total: int) -> None:
        if step == 25:
            raise Killed

    often = replace(settings, checkpoint_seconds=0.0)
    with pytest.raises(Killed):
        train(lists, often, tmp_path / "two", on_step=until)
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["checkpoint-24"]
    (tmp_path / "two" / "checkpoint-25").mkdir()  # killed while it was being written
    (tmp_path / "two" / "checkpoint-25" / "model.safetensors").write_text("half of")
    again: list[int] = []
    resumed = train(lists, settings, tmp_path / "two", on_step=lambda step, total: again.append(step))
    assert again == list(range(25, 61))
    for (name, one), (_, other) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name

    passages = [f"{word} {words[70]}" for word in (*words[:7], words[99])]
    for query in words[:4]:
        assert rerank(model, query, list("abcdefgh"), passages)[0] == "h"
    model.save_pretrained(str(tmp_path / "saved"))
    from sentence_transformers import CrossEncoder

    loaded = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert loaded.num_labels == 1
    pairs = [(query, passage) for query, passages in lists[:3] for passage in passages]
    assert loaded.predict(pairs) == pytest.approx(model.predict(pairs), abs=1e-6)
