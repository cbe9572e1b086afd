"""Does InfoNCE alone hurt, and does listwise distillation help? The table of a replication sweep.

    COLLECTIONS=DIR python jobs/sweep.py configs/sweeps/replication.yaml      # goes on over days
    python benchmarks/replication.py out/replication [--quick]

Reads each collection's ``test.json``; writes ``replication.json`` and ``replication.md`` into ``results/``.
``default`` is what the recipe returns, the base model where gate or dev queries say so; the other variants
are the trained models themselves. The lead is the teacher's over the base model.
"""

import sys
from typing import Any

import numpy as np
from tested import write

KEYS = ("ndcg@10", "delta", "ci95", "p")
REFERENCE = "kl_infonce"  # sweep.reference


def summary(tested: dict[str, Any]) -> dict[str, Any]:
    """By collection base, teacher and every variant; the default's mean gain and share of the lead."""
    collections: dict[str, Any] = {}
    for name, document in tested.items():
        rows = {row["point"]["variant"]: row for row in document["settings"]}
        if "default" not in rows:
            sys.exit(f"{name}: the default failed, see {name}/sweep.html; run the sweep again")
        default = rows["default"]
        collections[name] = {
            "base": {"ndcg@10": document["base"]["ndcg@10"]},
            "teacher": {key: default["teacher"][key] for key in KEYS},
            "queries": document["queries"],
            "seeds": default["seeds"],
        }
        for variant, row in rows.items():
            system = "returned" if variant == "default" else "candidate"
            keys = KEYS if variant == "default" else (*KEYS, "p_holm")
            collections[name][variant] = {key: row[system][key] for key in keys}
            if variant != "default":  # the same trainings as the reference's
                collections[name][variant]["against_reference"] = row["against_reference"]
    leads = {name: c["teacher"]["delta"] for name, c in collections.items()}
    gains = {name: c["default"]["delta"] for name, c in collections.items()}
    shares = {n: gains[n] / leads[n] for n in collections if leads[n] > 0}
    return {
        "collections": collections,
        "mean_gain": float(np.mean(list(gains.values()))),
        "share_of_lead": sum(gains[n] for n in shares) / sum(leads[n] for n in shares) if shares else None,
        "share_of_lead_by_collection": shares,
    }


def table(document: dict[str, Any]) -> str:
    """The summary as Markdown."""
    collections = document["collections"]
    facts = ("base", "teacher", "queries", "seeds")
    variants = list(dict.fromkeys(key for c in collections.values() for key in c if key not in facts))
    lines = [
        "# Replication: nDCG@10 on test queries",
        "",
        "Difference to the base model with its 95 % interval over queries and p (paired randomisation "
        "test, of trained models after Holm); the mean over seeds where there are several. `default` is "
        "what the recipe returns.",
        "",
        "| collection | queries | seeds | base | teacher | " + " | ".join(variants) + " |",
        "|---|" + "---|" * (4 + len(variants)),
    ]
    for name, c in collections.items():
        cells = [
            f"{c[v]['ndcg@10']:.4f} ({c[v]['delta']:+.4f}, {c[v]['ci95'][0]:+.4f} to {c[v]['ci95'][1]:+.4f}, "
            f"p {c[v].get('p_holm', c[v]['p']):.2g})"
            if v in c
            else "failed"
            for v in ("teacher", *variants)
        ]
        start = f"| {name} | {c['queries']} | {c['seeds']} | {c['base']['ndcg@10']:.4f} | "
        lines.append(start + " | ".join(cells) + " |")
    others = [v for v in variants if v not in ("default", REFERENCE)]
    lines += [
        "",
        f"Trained models beside that of {REFERENCE}, p after Holm:",
        "",
        "| collection | " + " | ".join(others) + " |",
        "|---|" + "---|" * len(others),
    ]
    for name, c in collections.items():
        beside = [c[v]["against_reference"] if v in c else None for v in others]
        cells = [
            f"{d['delta']:+.4f} ({d['ci95'][0]:+.4f} to {d['ci95'][1]:+.4f}, p {d['p_holm']:.2g})"
            if d
            else "–"
            for d in beside
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    share = document["share_of_lead"]
    closed = f"{share:.0%}" if share is not None else "it leads nowhere"
    lines += [
        "",
        f"Mean gain of the default: {document['mean_gain']:+.4f}. Share of the lead closed: {closed}"
        + "".join(f"; {name} {own:.0%}" for name, own in document["share_of_lead_by_collection"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def compared(document: dict[str, Any]) -> tuple[float, float]:
    """The default's and the base model's ndcg@10, means over collections."""
    rows = document["collections"].values()
    ours, base = ([c[system]["ndcg@10"] for c in rows] for system in ("default", "base"))
    return float(np.mean(ours)), float(np.mean(base))


if __name__ == "__main__":
    write("replication", __doc__, summary, table, compared)
