"""Training lists as the training loop takes them, and the texts behind them, out of the stages' tables."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import chain

import numpy as np
import pyarrow as pa
import torch

from retrieval_ray import schema
from retrieval_ray.artifacts import Stage, digest
from retrieval_ray.batching import rectangular
from retrieval_ray.losses import calibrate_temperature
from retrieval_ray.negatives import Scores
from retrieval_ray.stages.collection import Grouped
from retrieval_ray.stages.encode import Vectors
from retrieval_ray.stages.ingest import texts_of
from retrieval_ray.stages.queries import qrels_of, queries_table
from retrieval_ray.stages.retrieve import FUSED, rankings_of
from retrieval_ray.step import Lists
from retrieval_ray.training_data import CorpusData


def lists_of(groups: Stage, split: str, negatives: Stage | None = None, share: float = 1.0) -> Lists:
    """negatives: gives the queries that the lists' negatives answer.

    share: of the lists, those whose query's hash comes first.
    """
    table = schema.check(groups.read("groups.parquet"), "groups", groups.folder.path)
    table = table.filter(pa.compute.equal(table.column("split"), split))
    if share < 1:
        ids = table.column("query_id").to_pylist()
        first = sorted(range(len(ids)), key=lambda n: digest(ids[n]))[: max(1, round(share * len(ids)))]
        table = table.take(sorted(first))
    passages = table.column("passage_ids").to_pylist()
    own = None
    if negatives is not None:
        queries = written(negatives)
        of = dict(
            zip(*(queries.column(name).to_pylist() for name in ("passage_id", "query_id")), strict=True)
        )
        own = [[of.get(passage) for passage in row[1:]] for row in passages]
    return Lists(
        query_ids=table.column("query_id").to_pylist(),
        passage_ids=passages,
        teacher_BK=rectangular(table.column("teacher_scores").to_pylist(), -np.inf),
        excluded_ids=table.column("excluded_ids").to_pylist(),
        negative_query_ids=own,
    )


def written(negatives: Stage) -> pa.Table:
    return schema.check(negatives.read("queries.parquet"), "queries", negatives.folder.path)


def data_of(corpus: Grouped, depth: int, share: float = 1.0) -> CorpusData:
    """Read on every worker: only ids travel. The texts that they name are read when one is asked for.

    share: of the training lists.
    """
    qrels = qrels_of(corpus.queries, "dev")
    fused = rankings_of(corpus.retrieved, FUSED, qrels) if qrels else {}
    train = lists_of(corpus.groups, "train", corpus.negatives, share)
    dev = lists_of(corpus.groups, "dev")
    dev_pools = {q: [p for p, _ in fused.get(q, [])[:depth]] for q in qrels}

    def passages() -> Mapping[str, str]:
        named = chain(train.passage_ids, dev.passage_ids, dev_pools.values())
        return texts_of(corpus.corpus, chain.from_iterable(named))

    return CorpusData(
        name=corpus.name,
        train=train,
        dev=dev,
        passages=_Texts(passages),
        queries=_Texts(partial(_queries_of, corpus)),
        dev_qrels=qrels,
        dev_pools=dev_pools,
    )


class _Texts(Mapping[str, str]):
    """Texts that are read when one is asked for: of a machine's ranks, one tokenises for all."""

    def __init__(self, read: Callable[[], Mapping[str, str]]) -> None:
        self._read = read

    @cached_property
    def _found(self) -> Mapping[str, str]:
        return self._read()

    def __getitem__(self, text_id: str) -> str:
        return self._found[text_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _queries_of(corpus: Grouped) -> dict[str, str]:
    table = queries_table(corpus.queries)
    if corpus.negatives is not None:  # some stand in both, with the same text
        table = pa.concat_tables([table, written(corpus.negatives)])
    return dict(zip(*(table.column(name).to_pylist() for name in ("query_id", "text")), strict=True))


def calibrated(corpora: list[Grouped], lists: list[Lists], teacher_temperature: float) -> float:
    """The temperature that brings the untouched student nearest to the teacher, on training lists.

    Its cosines are at hand: the encode stages hold every vector.
    """
    student: list[Scores] = []
    teacher: list[Scores] = []
    for corpus, part in zip(corpora, lists, strict=True):
        if not len(part.query_ids):
            continue
        ids = sorted({passage for row in part.passage_ids for passage in row})
        passages_ND = Vectors.all(corpus.passages).of(ids)
        queries_QD = Vectors.all(corpus.query_vectors).of(part.query_ids)
        at = {key: n for n, key in enumerate(ids)}
        for query_D, row in zip(queries_QD, part.passage_ids, strict=True):
            student.append(passages_ND[[at[p] for p in row]].astype(np.float64) @ query_D.astype(np.float64))
        teacher += [row[np.isfinite(row)] for row in part.teacher_BK]
    return calibrate_temperature(
        torch.from_numpy(rectangular(student, 0.0)),
        torch.from_numpy(rectangular(teacher, -np.inf)),
        teacher_temperature=teacher_temperature,
    )
