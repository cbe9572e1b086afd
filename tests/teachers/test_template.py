"""Prompts in tokens: the text's own tokens, cut in the passage, then in the query, never at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_ray.errors import UserError
from retrieval_ray.teachers.template import Template
from tests.ray.llm import make_llm

TEXT = "<|user|>{instruction}\nquery: {query}\npassage: {passage}\nAnswer:<|assistant|>"
PIECES = st.text(st.sampled_from("ab silk\n{}é👩"), max_size=200)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_llm(tmp_path_factory.mktemp("llm")))


@given(PIECES, PIECES, st.integers(60, 150))
def test_only_passage_and_query_are_cut(tokenizer, query, passage, most):
    template = Template(tokenizer, TEXT, max_tokens=most, ends_open=True, instruction="sells")
    (row,) = template.rows([query], [passage])
    text = TEXT.format(instruction="sells", query=query, passage=passage)
    full = tokenizer(text)["input_ids"]
    if len(full) <= most:
        assert row == full
        return
    assert len(row) == most
    found = tokenizer.decode(row, errors="ignore")
    assert found.startswith("<|user|>sells\nquery: ") and found.endswith("\nAnswer:<|assistant|>")
    assert "\npassage: " in found
    size = {
        name: len(tokenizer(text)["input_ids"]) for name, text in (("query", query), ("passage", passage))
    }
    if size["query"] < size["passage"] and size["query"] < (most - 60) // 2:
        assert f"query: {query}\npassage: " in found  # the longer one is cut first


def test_a_template_that_leaves_no_room_is_the_users_error(tokenizer):
    with pytest.raises(UserError, match="no room"):
        Template(tokenizer, TEXT, max_tokens=20, ends_open=True)


@pytest.mark.parametrize("ends_open", [True, False])
def test_what_the_tokenizer_sets_at_the_end_is_kept_or_left_out(tokenizer, ends_open):
    import copy

    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    other._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    template = Template(other, TEXT, max_tokens=100, ends_open=ends_open)
    for passage in ("silk", "silk " * 500):
        (row,) = template.rows(["who"], [passage])
        assert row[0] == 0 and (row[-1] == 1) is not ends_open
    own = Template(other, "<s>" + TEXT, max_tokens=100, ends_open=True)
    assert own.rows(["who"], ["silk"])[0].count(0) == 1  # not a second one


def test_many_and_very_long_prompts_are_tokenised_in_parts(tokenizer, monkeypatch):
    template = Template(tokenizer, TEXT, max_tokens=60, ends_open=True)
    passages = [f"silk {n} " + "silk " * (n % 40) for n in range(600)] + ["silk " * 40_000]
    expected = [template.rows(["who"], [passage])[0] for passage in passages]
    texts, whole = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, **given: texts.append(text) or whole(self, text, **given),
    )
    assert template.rows(["who"] * len(passages), passages) == expected
    together = [text for text in texts if isinstance(text, list)]
    assert max(map(len, together)) == 256 and max(len(t) for part in together for t in part) < 10_000
