"""Files of other libraries' formats, read back by those libraries' own loaders where these are installed.

``make test`` installs PyLate and FlagEmbedding; Tevatron's present loader comes with its repository alone.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from retrieval_ray.export import FORMATS

from .test_export import LISTS, lines

datasets = pytest.importorskip("datasets")


def imported(package: str, module: str) -> ModuleType:
    """A module of a package that is installed; one that does not import is no reason to skip."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}")
    return importlib.import_module(module)


def written(form: str, folder: Path) -> Path:
    return lines([FORMATS[form](row) for row in LISTS], folder / "train.jsonl")


@pytest.mark.parametrize("distilled", [True, False])
def test_flagembedding(distilled: bool, tmp_path: Path) -> None:
    abc = imported("FlagEmbedding", "FlagEmbedding.abc.finetune.embedder")
    arguments = abc.AbsEmbedderDataArguments(
        train_data=[str(written("flagembedding", tmp_path))],
        cache_path=str(tmp_path / "cache"),
        train_group_size=4,
        knowledge_distillation=distilled,
    )
    read = abc.AbsEmbedderTrainDataset(arguments, tokenizer=None)
    assert len(read) == len(LISTS)
    for n, row in enumerate(LISTS):
        query, passages, scores = read[n]
        assert query == row.query and passages[0] == row.passages[0].read
        texts = [p.read for p in row.passages]
        assert sorted(passages) == sorted(texts)  # it shuffles the negatives
        expected = [row.scores[texts.index(text)] for text in passages]
        assert scores == (expected if distilled else None)


def test_pylate(tmp_path: Path) -> None:
    utils = imported("pylate", "pylate.utils")
    passages = {p.passage_id: p.read for row in LISTS for p in row.passages}
    queries = datasets.Dataset.from_list([{"query_id": r.query_id, "text": r.query} for r in LISTS])
    documents = datasets.Dataset.from_list([{"document_id": p, "text": t} for p, t in passages.items()])
    read = datasets.load_dataset(
        "json", data_files=str(written("pylate", tmp_path)), split="train", cache_dir=str(tmp_path / "cache")
    )
    read.set_transform(utils.KDProcessing(queries=queries, documents=documents).transform)
    for found, row in zip(read, LISTS, strict=True):
        assert found["query"] == row.query and found["scores"] == row.scores
        assert found["documents"] == [p.read for p in row.passages]


@pytest.mark.parametrize("distilled", [True, False])
def test_tevatron(distilled: bool, tmp_path: Path) -> None:
    dataset = imported("tevatron", "tevatron.retriever.dataset")
    arguments = sys.modules["tevatron.retriever.arguments"].DataArguments(
        dataset_name="json",
        dataset_path=str(written("tevatron", tmp_path)),
        dataset_split="train",
        dataset_cache_dir=str(tmp_path / "cache"),
        train_group_size=4,
    )
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=0.0), args=SimpleNamespace(seed=0))
    read = (dataset.DistilTrainDataset if distilled else dataset.TrainDataset)(arguments, trainer)
    assert len(read) == len(LISTS)
    for n, row in enumerate(LISTS):
        query, passages, *scores = read[n]
        texts = [text.strip() for text, *_ in passages]  # it puts a blank where a title is empty
        assert query[0] == row.query and texts[0] == row.passages[0].read
        own = [p.read for p in row.passages]
        assert sorted(texts) == sorted(own)
        assert scores == ([[row.scores[own.index(text)] for text in texts]] if distilled else [])
