"""How fast is encoding against sentence-transformers' own ``encode``?

    python benchmarks/encode.py [--quick] [--data FOLDER] [--model NAME]

Ours: ``Student.encode`` with the precision and the token budget that a run here would use. The peer: its
default (float32, batches of 32), and every better setting it has on this machine: larger batches, autocast
and the whole model in bfloat16. Same texts, runs interleaved, medians compared. ``ratio`` is to the peer's
default, ``ratio_to_best`` to its best. Equal: cosines to the peer's float32 of .999 at least, and in
float32 vectors within 1e-3 of it.
"""

import numpy as np
import torch
from measure import interleaved, parser, report
from sentence_transformers import SentenceTransformer
from texts import passage_texts

from retrieval_ray.model_files import resolve_model
from retrieval_ray.student import Student, default_token_budget, probe_precision


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--data", help="a folder in BEIR layout; without it, lengths like SciFact's")
    arguments.add_argument("--model", default="all-MiniLM-L6-v2")
    arguments.add_argument("--texts", type=int, help="how many")
    arguments.add_argument("--rounds", type=int)
    given = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count = given.texts or (20_000 if device == "cuda" else 128 if given.quick else 512)
    texts = passage_texts(count, given.data)
    precision, budget = probe_precision(device), default_token_budget(device)
    folder = resolve_model(given.model, "--model")
    student = Student(folder, precision=precision, device=device)
    exact = Student(folder, precision="float32", device=device)
    plain = SentenceTransformer(folder, device=device, local_files_only=True)
    half = SentenceTransformer(
        folder, device=device, local_files_only=True, model_kwargs={"dtype": torch.bfloat16}
    )

    def theirs(model: SentenceTransformer, batch: int, *, cast: bool = False) -> np.ndarray:
        with torch.autocast(device, torch.bfloat16, cast):
            found = model.encode(
                texts, batch_size=batch, show_progress_bar=False, normalize_embeddings=True,
                convert_to_tensor=True,
            )  # fmt: skip
        return np.asarray(found.float().cpu())

    settings = {"default": lambda: theirs(plain, 32)}
    for batch in (16, 128) if device == "cpu" else (128, 512):
        settings[f"float32, batches of {batch}"] = lambda batch=batch: theirs(plain, batch)
    for batch in (16, 32, 128) if device == "cpu" else (128, 512):
        settings[f"autocast, batches of {batch}"] = lambda batch=batch: theirs(plain, batch, cast=True)
        settings[f"bfloat16, batches of {batch}"] = lambda batch=batch: theirs(half, batch)

    def ours() -> np.ndarray:
        return student.encode(texts, "passage", token_budget=budget)

    reference = settings["default"]()
    cosine = float((ours() * reference).sum(axis=1).min())
    difference = float(np.abs(exact.encode(texts, "passage", token_budget=budget) - reference).max())
    if given.quick:  # the slow settings were tried once to find the best; two of them stay
        fast = precision if precision == "bfloat16" else "float32, batches of 16"
        settings = {name: run for name, run in settings.items() if name == "default" or fast in name}
    rounds = given.rounds or (1 if given.quick else 5)
    seconds = interleaved({"ours": ours, **settings}, rounds)
    rates = {name: count / value for name, value in seconds.items()}
    mine = rates.pop("ours")
    best = max(rates, key=lambda name: rates[name])
    report(
        "encode",
        quick=given.quick,
        ratio=mine / rates["default"],
        ours=mine,
        peer=rates["default"],
        unit="passages/s",
        equal=cosine >= 0.999 and difference < 1e-3,
        ratio_to_best=mine / rates[best],
        best=best,
        peers=rates,
        least_cosine=round(cosine, 6),
        float32_difference=difference,
        precision=precision,
        token_budget=budget,
        texts=count,
        rounds=rounds,
        data=given.data and given.data.rstrip("/").rpartition("/")[2] or "lengths like SciFact's",
        model=given.model,
    )


if __name__ == "__main__":
    main()
