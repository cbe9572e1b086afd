"""Rows of other libraries' formats: read back by sentence-transformers itself, else field by field."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.export import FORMATS, Passage, ScoredList, common_length, cut, without

LISTS = [
    ScoredList(
        f"q{n}",
        f"question {n} „mit“ Umlaut äöü\u2028",
        [Passage(f"p{n}{k}", "Title" * (k % 2), f"text {n} {k}") for k in range(4)],
        [1.0, 0.5, 0.25, 0.125 * n],
    )
    for n in range(3)
]


def lines(rows: list[dict[str, object]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_models_read_has_a_title_only_where_there_is_one() -> None:
    assert [p.read for p in LISTS[0].passages[:2]] == ["text 0 0", "Title text 0 1"]


@pytest.mark.parametrize("loss", ["DistillKLDivLoss", "MarginMSELoss"])
def test_sentence_transformers_trains_on_the_rows(loss: str, student_folder: str, tmp_path: Path) -> None:
    """Its loader, its collator, its loss: the value is that of the same lists by hand."""
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

    path = lines([FORMATS["sentence-transformers"](row) for row in LISTS], tmp_path / "train.jsonl")
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert loaded.column_names == ["query", "positive", "negative_1", "negative_2", "negative_3", "scores"]
    model = SentenceTransformer(student_folder, device="cpu")
    batch = SentenceTransformerDataCollator(model.preprocess)(list(loaded))
    columns = []
    for name in loaded.column_names[:-1]:
        own = {k.removeprefix(f"{name}_"): v for k, v in batch.items() if k.startswith(f"{name}_")}
        columns.append(own)
    assert batch["label"].tolist() == [row.scores for row in LISTS]
    value = getattr(losses, loss)(model)(columns, batch["label"])
    query = model.encode([row.query for row in LISTS], convert_to_tensor=True)
    texts = [[p.read for p in row.passages] for row in LISTS]
    scores = torch.stack(
        [model.encode(t, convert_to_tensor=True) @ q for t, q in zip(texts, query, strict=True)]
    )
    teacher = torch.tensor([row.scores for row in LISTS])
    if loss == "DistillKLDivLoss":
        p = teacher.softmax(1)
        expected = (p * (p.log() - scores.log_softmax(1))).sum(1).mean()
    else:
        expected = ((scores[:, :1] - scores[:, 1:] - teacher[:, :1] + teacher[:, 1:]) ** 2).mean()
    assert value.item() == pytest.approx(float(expected), rel=1e-4)


def test_tevatron_has_one_positive_and_titles_apart() -> None:
    row = FORMATS["tevatron"](LISTS[1])
    assert row.keys() == {"query_id", "query", "positive_passages", "negative_passages"}
    assert row["positive_passages"] == [{"docid": "p10", "title": "", "text": "text 1 0", "score": 1.0}]
    assert [p["docid"] for p in row["negative_passages"]] == ["p11", "p12", "p13"]
    # what its loader makes of a passage is what our models read
    for passage, own in zip(row["negative_passages"], LISTS[1].passages[1:], strict=True):
        assert (passage["title"] + " " + passage["text"]).strip() == own.read


def test_flagembedding_has_parallel_texts_and_scores() -> None:
    row = FORMATS["flagembedding"](LISTS[1])
    assert row.keys() == {"query", "pos", "neg", "pos_scores", "neg_scores"}
    assert row["pos"] == ["text 1 0"] and row["pos_scores"] == [1.0]
    assert list(zip(row["neg"], row["neg_scores"], strict=True)) == [
        ("Title text 1 1", 0.5), ("text 1 2", 0.25), ("Title text 1 3", 0.125)
    ]  # fmt: skip


def test_pylate_has_ids_and_scores_of_the_same_length() -> None:
    row = FORMATS["pylate"](LISTS[2])
    assert row == {
        "query_id": "q2", "document_ids": ["p20", "p21", "p22", "p23"], "scores": [1.0, 0.5, 0.25, 0.25]
    }  # fmt: skip


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_rows_survive_json_lines(form: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [FORMATS[form](row) for row in LISTS]
    path = lines(rows, tmp_path / "train.jsonl")
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    assert list(loaded) == rows


def test_a_positive_is_never_dropped_and_scores_follow_their_passages() -> None:
    left = without(LISTS[0], {"p00", "p02"})
    assert [p.passage_id for p in left.passages] == ["p00", "p01", "p03"] and left.scores == [1.0, 0.5, 0.0]
    assert [p.passage_id for p in cut(left, 2).passages] == ["p00", "p01"] and cut(left, 2).scores == [
        1.0,
        0.5,
    ]


@given(st.lists(st.integers(1, 12), max_size=9))
def test_lists_are_cut_where_most_negatives_are_left(lengths: list[int]) -> None:
    def left(length: int) -> int:
        return (length - 1) * sum(own >= length for own in lengths)

    found = common_length(lengths)
    assert (found == 0) == (max(lengths, default=1) == 1)
    if found:
        assert left(found) == max(left(length) for length in lengths)
    assert common_length([6, 6, 6]) == 6 and common_length([50, 50, 50, 3]) == 50
