"""The training loop on a tiny model, without Ray."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from retrieval_ray.artifacts import Location
from retrieval_ray.batching import rectangular
from retrieval_ray.errors import UserError
from retrieval_ray.experts import add_experts
from retrieval_ray.fit import fit
from retrieval_ray.moe import Layout
from retrieval_ray.student import Student
from retrieval_ray.training_data import some_of_each
from tests.corpora import SETTINGS, Killed, assert_near, kill_at, tiny_corpus


@pytest.fixture
def corpus(words):
    return tiny_corpus(words)


def _fit(folder, corpus, target, settings=SETTINGS, **more):
    student = Student(folder, precision="float32", device="cpu")
    progress = fit(student, [corpus], settings, Location.of(str(target)), **more)
    return progress, {name: p.detach().clone() for name, p in student.model.named_parameters()}


@pytest.mark.parametrize("sample", [None, 2])
def test_a_run_killed_and_resumed_drops_and_draws_the_same_and_ends_with_the_same_weights(
    student_folder, corpus, tmp_path, sample
):
    settings = replace(SETTINGS, list_sample=sample)
    whole, weights = _fit(student_folder, corpus, tmp_path / "whole", settings)

    with pytest.raises(Killed):
        _fit(student_folder, corpus, tmp_path / "broken", settings, on_step=kill_at(4))
    torch.manual_seed(99)
    resumed, again = _fit(student_folder, corpus, tmp_path / "broken", settings)
    assert {row["passages"] for row in whole.steps} == {4 * (sample or 4), 2 * (sample or 4)}
    assert (resumed.steps, resumed.history) == (whole.steps, whole.history)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_every_step_has_its_rate_and_a_gradient_no_longer_than_told(
    student_folder, corpus, tmp_path, monkeypatch
):
    """As AdamW sees them, which is what counts."""
    settings = replace(SETTINGS, clip_norm=0.01, min_warmup_steps=2)
    rates, norms, true_step = [], [], torch.optim.AdamW.step

    def look(optimiser, *given):
        (group,) = optimiser.param_groups
        rates.append(group["lr"])
        norms.append(
            float(torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm())
        )
        return true_step(optimiser, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    progress, _ = _fit(student_folder, corpus, tmp_path, settings)
    # by hand: two epochs of three steps, of which two of warm-up
    assert rates == pytest.approx([1e-3 * share for share in (0.5, 1, 1, 0.75, 0.5, 0.25)])
    assert all(row["norm"] > 0.02 for row in progress.steps)  # before
    assert norms == pytest.approx([0.01] * 6, rel=1e-3)


def test_passages_are_drawn_from_lists_of_several_lengths(student_folder, corpus, tmp_path):
    lists = corpus.train
    lengths = [4 - n % 3 for n in range(len(lists.query_ids))]  # 2 to 4
    cut = [list(row[:length]) for row, length in zip(lists.passage_ids, lengths, strict=True)]
    scores = [row[:length] for row, length in zip(lists.teacher_BK, lengths, strict=True)]
    ragged = replace(lists, passage_ids=cut, teacher_BK=rectangular(scores, -np.inf))
    drawn = some_of_each(ragged, 2, np.random.default_rng(0))
    assert [len(row) for row in drawn.passage_ids] == [2] * len(cut) and np.isfinite(drawn.teacher_BK).all()
    expected = [dict(zip(row, own.tolist(), strict=True)) for row, own in zip(cut, scores, strict=True)]
    assert drawn.judged == expected
    for row, some, own in zip(drawn.passage_ids, drawn.teacher_BK, expected, strict=True):
        assert [own[p] for p in row] == some.tolist() and row[0] == next(iter(own))
    progress, _ = _fit(
        student_folder, replace(corpus, train=ragged), tmp_path, replace(SETTINGS, list_sample=2)
    )
    assert len(progress.steps) == 6 and not progress.skipped


def test_what_graphs_may_take_changes_no_bit_of_the_weights(student_folder, corpus, tmp_path):
    ends = [
        _fit(student_folder, corpus, tmp_path / str(most), replace(SETTINGS, activation_bytes=most))
        for most in (None, 0)
    ]
    assert ends[0][0].steps == ends[1][0].steps
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])


def test_dropout_is_off_unless_asked_for(student_folder, corpus, tmp_path):
    first = {}
    for dropout in (False, True):
        progress, _ = _fit(
            student_folder, corpus, tmp_path / str(dropout), replace(SETTINGS, dropout=dropout)
        )
        first[dropout] = progress.steps[0]["kl"]
    assert abs(first[False] - first[True]) > 1e-4


def test_every_step_says_its_terms_and_where_its_time_went(student_folder, corpus, tmp_path):
    progress, _ = _fit(student_folder, corpus, tmp_path)
    assert len(progress.steps) == len(progress.speed) == progress.step
    for row, speed in zip(progress.steps, progress.speed, strict=True):
        assert row["loss"] == pytest.approx(row["kl"] + 0.1 * row["infonce"])
        parts = sum(
            speed[f"{name}_seconds"] for name in ("data", "forward", "loss", "backward", "communication")
        )
        assert 0 < parts <= speed["seconds"]
        assert speed["tokens_per_second"] * speed["seconds"] == pytest.approx(row["tokens"])
        assert 0 < speed["matmul_share"] < 1


def test_what_experts_took_is_kept_by_epoch_through_a_kill_too(student_folder, corpus, tmp_path):
    settings = replace(SETTINGS, balance_weight=0.1, jitter=0.2)

    def run(target, **more):
        student = Student(student_folder, precision="float32", device="cpu")
        add_experts(student.model, Layout(3), seed=1)
        return fit(student, [corpus], settings, Location.of(str(target)), **more)

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", on_step=kill_at(whole.step - 1))  # in the second epoch
    again = run(tmp_path / "broken")
    assert (again.load, again.steps) == (whole.load, whole.steps)
    assert [row["epoch"] for row in whole.load] == [1, 2]
    half = len(whole.steps) // 2
    for row, steps in zip(whole.load, (whole.steps[:half], whole.steps[half:]), strict=True):
        assert len(row["taken"]) == 2  # layers
        for counts in row["taken"].values():
            assert len(counts) == 3 and sum(counts) == sum(step["tokens"] for step in steps)
    for step in whole.steps:
        assert step["loss"] == pytest.approx(step["kl"] + 0.1 * step["infonce"] + 0.1 * step["balance"])


def test_experts_that_choose_their_tokens_learn_and_a_kill_changes_nothing(student_folder, corpus, tmp_path):
    settings = replace(SETTINGS, jitter=0.2)

    def run(target, **more):
        student = Student(student_folder, precision="float32", device="cpu")
        add_experts(student.model, Layout(3, router="expert_choice"), seed=1)
        before = weights(student)
        return before, fit(student, [corpus], settings, Location.of(str(target)), **more), weights(student)

    def weights(student):
        return {name: p.detach().clone() for name, p in student.model.named_parameters()}

    before, whole, after = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", on_step=kill_at(whole.step - 1))
    _, again, same = run(tmp_path / "broken")
    assert again.steps == whole.steps and all(torch.equal(same[name], after[name]) for name in after)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    routers = {name for name in after if "router" in name}
    assert routers and routers <= moved


def test_the_queries_of_negatives_are_read_where_clp_has_a_weight(student_folder, corpus, tmp_path):
    """Each list's with the list, whatever batch it comes into; a negative may have none."""
    own = [[f"own-{p}" if p != "p3" else None for p in row[1:]] for row in corpus.train.passage_ids]
    texts = {f"own-{p}": text for p, text in corpus.passages.items()}
    corpus = replace(
        corpus,
        train=replace(corpus.train, negative_query_ids=own),
        queries={**corpus.queries, **texts},
    )
    objective = replace(SETTINGS.objective, weights={"clp": 1.0})
    progress, _ = _fit(
        student_folder, corpus, tmp_path, replace(SETTINGS, objective=objective, dropout=False)
    )
    # a query that is the passage's own text has, but for the prompt and the cut at 16 tokens, its embedding
    assert all(0 <= row["clp"] < 0.5 for row in progress.steps)
    assert progress.steps[-1]["clp"] < progress.steps[0]["clp"]


def test_the_log_has_a_line_of_json_a_step(student_folder, corpus, tmp_path):
    progress, _ = _fit(student_folder, corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    rows = zip(progress.steps, progress.speed, strict=True)
    assert lines == [{**step, **speed} for step, speed in rows]
    assert {"lr", "norm", "tokens_per_second", "forward_seconds", "loss_seconds"} <= lines[0].keys()
    assert [line["loss"] for line in lines] == [row["loss"] for row in progress.steps]
    assert lines[0]["time"] < lines[-1]["time"] <= time.time()
    epochs = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    assert epochs == progress.history


NEVER = replace(SETTINGS, checkpoint_seconds=math.inf)


def test_a_notice_leads_to_a_checkpoint(student_folder, corpus, tmp_path):
    """Asked after every step; without one, nothing is kept of an epoch that is under way."""
    asked = []

    def notice():
        asked.append(len(list(tmp_path.glob("checkpoint-*.safetensors"))))
        return len(asked) == 2

    with pytest.raises(Killed):
        _fit(student_folder, corpus, tmp_path, NEVER, should_checkpoint=notice, on_step=kill_at(3))
    assert asked == [1, 1]  # of the untouched student
    newest = sorted(tmp_path.glob("checkpoint-*"))[-1].name
    assert newest == "checkpoint-00000002-001.safetensors"
    seen = []
    _fit(student_folder, corpus, tmp_path, NEVER, on_step=lambda step, total, terms: seen.append(step))
    assert seen[0] == 3


def _spoil(monkeypatch, steps, what):
    """Make the loss or the gradient of these steps not finite; returns the queries at fault by step."""
    from retrieval_ray import fit as module

    true_step, number, at_fault = module.training_step, 0, {}

    def step(student, lists, tokens, query_tokens, *more, **options):
        nonlocal number
        number += 1
        table = student.model[0].auto_model.embeddings.word_embeddings.weight
        word = int(query_tokens(lists.query_ids[0])[1])
        kept = table[word].detach().clone()
        if number in steps:
            read = [[query_tokens(q), *map(tokens, row)] for q, row in
                    zip(lists.query_ids, lists.passage_ids, strict=True)]  # fmt: skip
            broken = [what == "gradient" or any(word in text for text in texts) for texts in read]
            at_fault[number] = [q for q, bad in zip(lists.query_ids, broken, strict=True) if bad]
        with torch.no_grad():
            if number in steps and what == "loss":
                table[word] = math.inf
        try:
            terms = true_step(student, lists, tokens, query_tokens, *more, **options)
        finally:
            with torch.no_grad():
                table[word] = kept
        if number in steps:
            table.grad[3] = math.nan
        return terms

    monkeypatch.setattr(module, "training_step", step)
    return at_fault


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    student_folder, corpus, tmp_path, monkeypatch, what
):
    student = Student(student_folder, precision="float32", device="cpu")
    at_fault, weights, losses = _spoil(monkeypatch, {2}, what), [], []

    def look(step, total, terms):
        weights.append(torch.cat([p.detach().flatten() for p in student.model.parameters()]))
        losses.append(terms["loss"])

    once = replace(SETTINGS, max_epochs=1)
    progress = fit(student, [corpus], once, Location.of(str(tmp_path)), on_step=look)
    assert [math.isnan(loss) for loss in losses] == [False, True, False]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert weights[2].isfinite().all()
    assert progress.step == 3 and [row["step"] for row in progress.steps] == [1, 3]
    whose = "queries" if what == "loss" else "one of 4 queries, among them"  # whose gradient, is not known
    found = f"{what} of {whose}"
    assert progress.skipped == [{"step": 2, "corpus": "tiny", "what": found, "queries": at_fault[2]}]


@pytest.mark.parametrize(
    ("steps", "seen"), [({2, 3, 4}, "3 steps of 4"), (set(range(1, 30, 2)), "10 steps of 19")]
)
def test_training_stops_after_a_few_steps_that_are_not_finite(
    student_folder, corpus, tmp_path, monkeypatch, steps, seen
):
    """Three in a row or ten in all, naming the queries."""
    at_fault = _spoil(monkeypatch, steps, "gradient")
    with pytest.raises(UserError, match=seen) as error:
        _fit(student_folder, corpus, tmp_path, replace(NEVER, max_epochs=9, patience=9))
    for queries in list(at_fault.values())[-3:]:
        assert ", ".join(queries) in str(error.value)


def test_a_resumed_run_remembers_the_steps_that_were_skipped(student_folder, corpus, tmp_path, monkeypatch):
    _spoil(monkeypatch, {1, 2}, "gradient")
    with pytest.raises(Killed):
        _fit(student_folder, corpus, tmp_path, on_step=kill_at(3))
    progress, _ = _fit(student_folder, corpus, tmp_path)
    assert [row["step"] for row in progress.skipped] == [1, 2]


def test_fused_adamw_is_adamw(student_folder, corpus, tmp_path, monkeypatch):
    fused, true_adamw = _fit(student_folder, corpus, tmp_path / "fused", NEVER)[1], torch.optim.AdamW

    def several_kernels(parameters, **more):
        return true_adamw(parameters, **{**more, "fused": None, "foreach": True})

    monkeypatch.setattr(torch.optim, "AdamW", several_kernels)
    _, weights = _fit(student_folder, corpus, tmp_path / "foreach", NEVER)
    assert_near(fused, weights, 2e-5)


def test_patience_counts_epochs_without_improvement(student_folder, corpus, tmp_path, monkeypatch):
    """Epochs 1 and 3 improve; two that do not end training, and epoch 3 is what is left."""
    from retrieval_ray import fit as module

    values, weights = iter([0.5, 0.6, 0.6, 0.7, 0.65, 0.7, 0.9]), []
    student = Student(student_folder, precision="float32", device="cpu")

    def measure(*_, **__):
        weights.append(torch.cat([p.detach().flatten() for p in student.model.parameters()]))
        value = next(values)
        return {"dev_ndcg@10": value}, [value - 0.1, value + 0.1]

    monkeypatch.setattr(module, "evaluate", measure)
    settings = replace(SETTINGS, max_epochs=9, patience=2)
    progress = fit(student, [corpus], settings, Location.of(str(tmp_path)))
    assert [row["epoch"] for row in progress.history] == [0, 1, 2, 3, 4, 5]
    assert progress.best_epoch == 3
    assert progress.by_query[3] == pytest.approx([0.6, 0.8]) and len(progress.by_query) == 6
    left = torch.cat([p.detach().flatten() for p in student.model.parameters()])
    assert torch.equal(left, weights[3]) and not torch.equal(left, weights[5])


def test_each_step_is_of_one_corpus_and_corpora_take_turns(student_folder, words, tmp_path, monkeypatch):
    from retrieval_ray import fit as module

    large, small = tiny_corpus(words, 12, "large"), tiny_corpus(words, 3, "small")
    seen = []

    def watch(student, lists, tokens, query_tokens, *more, **options):
        seen.append(frozenset(lists.query_ids))
        raise Killed if len(seen) == 6 else module.NotFinite("loss", [])

    monkeypatch.setattr(module, "training_step", watch)
    monkeypatch.setattr(module, "_stop_if_hopeless", lambda progress: None)
    student = Student(student_folder, precision="float32", device="cpu")
    with pytest.raises(Killed):
        fit(student, [large, small], replace(NEVER, patience=9), Location.of(str(tmp_path)))
    assert [len(batch) for batch in seen[:4]] == [4, 3, 4, 4]  # large, small (a short one), large, large
    assert seen[1] == set(small.train.query_ids)
    assert seen[0] | seen[2] | seen[3] == set(large.train.query_ids)


@pytest.mark.parametrize("pauses", [(1, 3), (4,), (5, 6)], ids=str)
def test_a_run_that_pauses_and_goes_on_ends_with_the_same_weights(student_folder, corpus, tmp_path, pauses):
    """Also where the pause is at the end of an epoch."""
    whole, weights = _fit(student_folder, corpus, tmp_path / "whole")
    for until in pauses:
        paused, _ = _fit(student_folder, corpus, tmp_path / "broken", until=until)
        assert (paused.step, paused.done) == (until, False)
        again, _ = _fit(student_folder, corpus, tmp_path / "broken", until=until)  # is not trained further
        assert again.steps == paused.steps == whole.steps[:until]
    ended, last = _fit(student_folder, corpus, tmp_path / "broken", until=10_000)
    assert ended.done and (ended.steps, ended.history) == (whole.steps, whole.history)
    assert all(torch.equal(weights[name], last[name]) for name in weights)


def test_a_pause_leaves_the_weights_of_its_step(student_folder, corpus, tmp_path):
    """Not those of the best epoch, and not the checkpoint before."""
    _, paused = _fit(student_folder, corpus, tmp_path / "pause", until=3)
    seen = {}

    def keep(student):
        def on_step(step, total, terms):
            if step == 3:
                seen.update({name: p.detach().clone() for name, p in student.model.named_parameters()})

        return on_step

    student = Student(student_folder, precision="float32", device="cpu")
    fit(student, [corpus], SETTINGS, Location.of(str(tmp_path / "whole")), on_step=keep(student))
    assert all(torch.equal(seen[name], paused[name]) for name in seen)


def test_lists_may_change_in_a_pause(student_folder, corpus, tmp_path):
    """What follows is trained on the new lists, in the order of queries that was going on."""
    whole, _ = _fit(student_folder, corpus, tmp_path / "whole")
    _fit(student_folder, corpus, tmp_path / "changed", until=2)
    others = replace(corpus.train, passage_ids=[[row[0], *row[:0:-1]] for row in corpus.train.passage_ids])
    changed, _ = _fit(student_folder, replace(corpus, train=others), tmp_path / "changed")
    assert changed.steps[:2] == whole.steps[:2]
    assert [row["kl"] for row in changed.steps[2:]] != [row["kl"] for row in whole.steps[2:]]
    assert [row["tokens"] for row in changed.steps] == [row["tokens"] for row in whole.steps]
