"""retrieval_ray: a corpus goes in, a dense retriever that is better on that corpus comes out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__version__ = "0.1.0"


def load(path: str, **options: Any) -> "SentenceTransformer":
    """The model of a run (``output_dir/model``), with experts or without, ready to encode.

    path: a folder, a URL or a hub id. options: those of ``SentenceTransformer``, like ``device``. Raises
    ``UserError`` where there is no model.
    """
    from retrieval_ray.model_files import load_model, resolve_model

    trust = bool(options.get("trust_remote_code", False))
    return load_model(resolve_model(path, "path", trust_remote_code=trust), **options)
