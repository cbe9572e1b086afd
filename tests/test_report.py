"""The report's parts that can be read without a run; tests/ray/test_adapt.py looks at a whole page."""

import re

from retrieval_ray.report import Facts, drops, page
from retrieval_ray.report_drift import comparison


def test_what_was_dropped_is_shown_with_samples_and_cannot_inject() -> None:
    page = drops(
        {"refusal": 2, "too_long": 1000},
        {"refusal": ["I'm sorry", "<script>alert(1)</script>"], "other": ["x"]},
    )
    assert page.index("too long<td>1,000") < page.index("refusal<td>2")  # the most frequent first
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>" not in page
    assert "other" not in page


def test_nothing_dropped_needs_no_table() -> None:
    assert drops({}, {}) == ""


SHARE = {"ndcg@5": 0.5, "ndcg@10": 0.25, "recall@100": 0.75, "mrr@10": 0.5, "map@100": 0.5}
TRUST = {
    "dev": {"queries": 2, "better": 1, "worse": 1},
    "losses": [
        {
            "query": "why <b>so</b>", "student": 0.875, "teacher": 0.125, "relevant": "the right one",
            "student_rank": 1, "teacher_rank": None, "teacher_first": "a wrong one",
        }
    ],
    "agreement": {"dense": {"tau": [0.0, 0.1, 0.2, 0.3, 0.4], "overlap@10": [0.1, 0.2, 0.3, 0.4, 0.5]}},
    "kinds": {
        "title": {
            "queries": 1234, "spread": [1.0, 2.0, 3.0, 4.0, 5.0], "sources": 1000, "not_first": 0.125,
            "inverted": 0.0625,
        },
        "log": {
            "queries": 7, "spread": [1.0, 1.0, 1.0, 1.0, 1.0], "sources": 0, "not_first": None,
            "inverted": 0.0,
        },
    },
    "inverted": [
        {
            "query": "an odd one", "kind": "title", "anchor": "source", "anchor_text": "where it is from",
            "rank": 19, "depth": 20, "gap": 3.25, "best_text": "what the teacher likes",
        }
    ],
}  # fmt: skip
PARITY = {
    "ours": "cross_encoder@aa-float32", "theirs": "cross_encoder@aa-bfloat16", "pairs": 4321,
    "largest": 0.0625, "mean": 0.015, "scale": 2.5, "rank_correlation": 0.99875,
}  # fmt: skip


def _facts(**more: object) -> Facts:
    return Facts(
        metrics={
            "dataset": "shop", "split": "test", "queries_judged": 2, "decision": "base", "training": None,
            "systems": {"base": SHARE, "adapted": SHARE},
            "delta": {"ndcg@10": {"mean": 0.0, "ci95": [0, 0], "p": 1.0}},
            "queries": {"kept": 3, "rejected": {"not_first": 2, "refusal": 1}},
        },
        gate={"weights": {"late": 1.0}, "passed": None},
        groups={
            "train": 2, "dev": 1, "rejected": {"not_first": 2}, "trust": TRUST,
            "samples": {"not_first": ["which shop (the teacher prefers p9)"]},
            "score_quantiles": {"late": [0.0, 0.5, 1.0]},
            "left_out": {
                "masked": {"0": 1, "3": 5}, "too_close": 4, "lists_too_close": 2, "lists_filled_deeper": 1
            },
        },
        queries={"rejected": {"refusal": 1}, "samples": {"refusal": ["I cannot"]}},
        corpus={"rows": 5000, "rejected": {"duplicate": 17}},
        per_query={"base": {"q1": SHARE, "q2": SHARE}, "adapted": {"q1": SHARE, "q2": SHARE}},
        **more,
    )  # fmt: skip


def test_the_page_holds_what_was_found_of_the_teacher_and_loads_nothing() -> None:
    whole = page([_facts(beside={"q1": (0.875, 0.125), "q2": (0.5, 0.75)}, parity=[PARITY])], fit=None,
                 training=None)  # fmt: skip
    for figure in (
        "0.875", "0.125", "the right one", "student 1, teacher –", "a wrong one",  # the heaviest loss
        "1,234", "12.5%", "6.2%", "–",  # the kinds
        "19 of 20", "3.25", "source: where it is from", "what the teacher likes",  # the inverted pair
        "4,321", "0.0625", "0.9988", "cross_encoder@aa-bfloat16",  # parity
        "which shop (the teacher prefers p9)", "I cannot", "duplicate 17",  # drops by each rule
        "15 passages of 6 training lists", "4 of them, in 2 lists", "in 1 lists a deeper",
    ):  # fmt: skip
        assert figure in whole, figure
    assert "&lt;b&gt;so&lt;/b&gt;" in whole and "<b>so</b>" not in whole
    assert whole.count("<svg") == 8
    assert not re.search(r"""<(script|link|img|iframe)|(src|href)=["']?https?:""", whole)


def test_a_page_without_judged_dev_queries_shows_the_signs_alone() -> None:
    whole = page([_facts()], fit=None, training=None)
    assert "the right one" not in whole and "19 of 20" in whole and whole.count("<svg") == 7


def test_the_load_of_experts_is_drawn_for_the_best_trained_epoch_where_there_are_experts() -> None:
    fit = {
        "history": [{"epoch": 0.0, "step": 0.0, "dev_kl": 1.0}, {"epoch": 1.0, "step": 2.0, "dev_kl": 0.5}],
        "steps": [{"step": 1.0, "kl": 0.5, "balance": 1.25}, {"step": 2.0, "kl": 0.25, "balance": 1.125}],
        "best_epoch": 1, "load": [],
    }  # fmt: skip
    tau = {"student": 0.1, "teacher": 0.2, "infonce": 0.02}
    training = {"batch_queries": 4, "temperatures": tau, "epoch": 1, "refreshes": []}
    without = page([_facts()], fit=fit, training=training)
    assert "Each colour is an expert" not in without
    taken = {"encoder.layer.0": [30, 10], "encoder.layer.1": [0, 40]}
    whole = page([_facts()], fit={**fit, "load": [{"epoch": 1, "taken": taken}]}, training=training)
    assert "Each colour is an expert" in whole and whole.count("<svg") == without.count("<svg") + 1


def test_refreshes_of_negatives_and_rounds_are_shown_where_there_were_any() -> None:
    fit = {
        "history": [{"epoch": 0.0, "step": 0.0, "dev_kl": 1.0}, {"epoch": 1.0, "step": 1.0, "dev_kl": 0.5}],
        "steps": [{"step": 1.0, "kl": 0.5}], "best_epoch": 1, "load": [],
    }  # fmt: skip
    tau = {"student": 0.1, "teacher": 0.2, "infonce": 0.02}
    training = {"batch_queries": 4, "temperatures": tau, "epoch": 1, "refreshes": []}
    without = page([_facts()], fit=fit, training=training)
    assert "negatives of step" not in without and "This is round" not in without
    found = {"renewed": 1234, "new_negatives": 0.375, "judged": 5678, "from_cache": 91}
    row = {"mined_at": 40, "used_from": 80, "corpora": {"a<b": found}}
    whole = page([_facts()], fit=fit, training={**training, "refreshes": [row]}, rounds=2)
    assert "<tr><td>40<td>80<td>a&lt;b<td>1,234<td>37.5%<td>5,678<td>91</tr>" in whole.replace("</td>", "")
    assert "This is round 2" in whole
    assert "tokens a second" not in whole
    rates = {"tokens_per_second": 12345.6, "matmul_share": 0.51, "shares": {"data": 0.02, "backward": 0.6}}
    whole = page([_facts()], fit=fit, training=training, speed=rates)
    assert "12,346 tokens a second, 51% of" in whole and "backward 60.0%, data 2.0%" in whole


def _drift(**more: object) -> dict[str, object]:
    geometry = {
        "alignment": 0.875, "uniformity_passages": -2.125, "uniformity_queries": -3.0, "hubness": None
    }  # fmt: skip
    like = {"passages": 0.9375, "queries": 0.8125}
    rows = [
        {"layer": "embeddings", "cka": {"passages": None, "queries": None}, "cosine": like,
         "base": geometry, "trained": geometry},
        {"layer": "final", "cka": like, "cosine": like, "base": geometry,
         "trained": {**geometry, "alignment": 0.625, "hubness": 1.5}},
    ]  # fmt: skip
    return {
        "queries": 3, "passages": 1234, "layers": rows, "query_ids": ["a", "b", "c"],
        "moved": [0.125, 0.25, 0.5], "change": [0.5, 0.0, -0.25],
        "spearman": {"value": -0.4375, "p": 0.03125}, **more,
    }  # fmt: skip


def test_what_training_did_to_the_vectors_is_shown_where_a_model_was_trained() -> None:
    without = page([_facts()], fit=None, training=None)
    assert "What training did" not in without
    whole = page([_facts(drift=_drift())], fit=None, training=None)
    assert whole.count("<svg") == without.count("<svg") + 2
    for figure in (
        "1,234 passages", "3 judged queries", "-0.438", "p = 0.031",
        "<td>alignment</td><td>0.875</td><td>0.625</td>", "<td>hubness</td><td>–</td><td>1.500</td>",
        "<td>uniformity of passages</td><td>−2.125</td><td>−2.125</td>",
        "<td>embeddings</td><td>–</td><td>–</td><td>0.938</td><td>0.812</td>", "0.88→0.62",
    ):  # fmt: skip
        assert figure in whole, figure
    unevaluated = page([_facts(drift=_drift(change=None, spearman=None))], fit=None, training=None)
    assert unevaluated.count("<svg") == whole.count("<svg") - 1 and "Spearman" not in unevaluated


def test_gains_on_training_and_on_judged_queries_stand_together_where_both_were_measured() -> None:
    history = [
        {"epoch": float(n), "step": float(n), "dev_kl": 1.0, "teacher_ndcg@10": 0.5 + n / 8} for n in range(3)
    ]
    fit = {"history": history, "steps": [{"step": 1.0, "kl": 0.5}], "best_epoch": 1, "load": []}
    tau = {"student": 0.1, "teacher": 0.2, "infonce": 0.02}
    training = {"batch_queries": 4, "temperatures": tau, "epoch": 1, "refreshes": []}
    without = page([_facts()], fit=fit, training=training)
    judged = [{**row, "dev_ndcg@10": 0.25} for row in history]
    whole = page([_facts()], fit={**fit, "history": judged}, training=training)
    assert "overfits" in whole and "overfits" not in without
    assert whole.count("<svg") == without.count("<svg") + 1


def test_several_trainings_stand_beside_each_other() -> None:
    shown = comparison({"InfoNCE": _drift(), "a<b": _drift()})
    assert shown.count("<svg") == 1
    assert "<td>base</td><td>–</td><td>–</td><td>0.875</td>" in shown
    for name in ("InfoNCE", "a&lt;b"):
        assert f"<td>{name}</td><td>0.938</td><td>0.938</td><td>0.625</td><td>−2.125</td>" in shown
