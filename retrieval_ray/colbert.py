"""ColBERT checkpoints, whose transformer is followed by a projection of tokens.

Those of PyLate, of Stanford's code and of sentence-transformers' multi-vector encoders. Loaded as a plain
bi-encoder they would lose the projection without a word.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def is_colbert(folder: Path) -> bool:
    """Whether the folder says of itself that it makes a vector for each token."""
    declared = _read(folder / "config_sentence_transformers.json", {}).get("model_type")
    modules = _read(folder / "modules.json", [])
    pylate = any(str(module.get("type", "")).startswith("pylate.") for module in modules)
    stanford = not modules and "HF_ColBERT" in (_read(folder / "config.json", {}).get("architectures") or [])
    return declared in ("ColBERT", "MultiVectorEncoder") or pylate or stanford


def load_colbert(path: str, **options: Any) -> "SentenceTransformer":
    """Its transformer, its projections and a mean pooling; its markers of queries and passages are prompts.

    What else ColBERT does is left out: queries filled up with masks, and passages freed of punctuation.
    """
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling

    read = MultiVectorEncoder(path, **options)
    modules = [module for module in read if not isinstance(module, (MultiVectorMask, Normalize))]
    modules.append(Pooling(modules[-1].get_embedding_dimension(), pooling_mode="mean"))
    return SentenceTransformer(modules=modules, prompts=read.prompts, device=str(read.device))


def _read(path: Path, missing: Any) -> Any:
    """The content of a JSON file of the same kind as ``missing``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return missing
    return found if isinstance(found, type(missing)) else missing
