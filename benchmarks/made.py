"""What benchmarks of stages run on: a tiny random encoder, corpora and queries as stages of any size."""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch

from retrieval_ray import schema
from retrieval_ray.artifacts import Location, Stage, bucket_count, part_name, stage
from retrieval_ray.config import ComputeConfig, Config, StudentConfig
from retrieval_ray.datasets import rejects_table
from retrieval_ray.model_files import resolve_model
from retrieval_ray.stages.collection import Collection
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile


def tiny_encoder(folder: str, *, hidden: int, layers: int = 1) -> str:
    """A random BERT of that size with MiniLM's tokenizer, as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    bert = str(Path(folder) / "bert")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("all-MiniLM-L6-v2", "model"))
    tokenizer.save_pretrained(bert)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), intermediate_size=hidden, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(bert)
    modules = [Transformer(bert, max_seq_length=256), Pooling(hidden), Normalize()]
    encoder = str(Path(folder) / "encoder")
    SentenceTransformer(modules=modules, device="cpu").save(encoder, create_model_card=False)
    return encoder


def context(folder: str, model: str, *, workers: int, threads: int, precision: str, budget: int) -> Context:
    """A run of stages in this folder; no job around it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config(
        student=StudentConfig(model=model), compute=ComputeConfig(workers=workers), output_dir=folder
    )
    profile = Profile(precision, device, threads, budget, workers)
    return Context(config, Location.of(folder), profile)


def collection(
    run: Context, name: str, passages: Iterable[str], count: int, queries: list[str], *, part_rows: int = 512
) -> Collection:
    """A corpus of ``count`` passages, written part by part as they come, with queries."""
    corpus = stage(run.store, "corpus", {"name": name, "count": count, "titles": False})
    buckets, texts = bucket_count(count, part_rows), iter(passages)
    names = [part_name("corpus", number, "arrow") for number in range(buckets)]
    for number, part in enumerate(names):
        size = count * (number + 1) // buckets - count * number // buckets
        rows = [
            {"passage_id": f"p{number:06d}-{n}", "title": "", "text": text}
            for n, text in enumerate(islice(texts, size))
        ]
        corpus.write(part, schema.from_rows("corpus", rows))
    corpus.write("rejects.parquet", rejects_table("dedup", []))
    corpus.finish([*names, "rejects.parquet"], rows=count, buckets=buckets)
    return Collection(name, "test", 1, corpus, None, log_queries(run, name, queries))


def log_queries(run: Context, name: str, texts: list[str]) -> Stage:
    """These texts as a queries stage, a log's."""
    target = stage(run.store, "queries", {"name": name, "count": len(texts)})
    buckets = bucket_count(len(texts))
    names = [part_name("queries", number, "parquet") for number in range(buckets)]
    for number, part in enumerate(names):
        rows = [
            {
                "query_id": f"q{n}", "text": texts[n], "kind": "log", "language": None, "split": "train",
                "passage_id": None, "generator": "log",
            }
            for n in range(number, len(texts), buckets)
        ]  # fmt: skip
        target.write(part, schema.from_rows("queries", rows))
    target.finish(names, rows=len(texts), buckets=buckets)
    return target


def start_ray(cpus: int = 8) -> None:
    """A local cluster without the noise."""
    import ray

    os.environ.update(
        RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1"
    )
    ray.init(
        address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    # a cluster that was there: else a single worker would be this process, and nothing of Ray be measured
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
