"""What a stage's manifest says of its run. Starts no Ray."""

from pathlib import Path

import pytest

from retrieval_ray.artifacts import Location, stage
from retrieval_ray.config import Config
from retrieval_ray.forecast import Ledger, Work
from retrieval_ray.stages.context import Context
from retrieval_ray.stages.profile import Profile

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("worked", "compared"), [(10, {"seconds", "tokens_in", "tokens_out"}), (4, set())])
def test_a_resumed_stage_is_compared_by_what_all_runs_made_together(
    tmp_path: Path, worked: int, compared: set[str]
) -> None:
    """Its time and its tokens are those of the last run alone."""
    context = Context(Config(), Location.of(str(tmp_path)), Profile("float32", "cpu", 1, 1024, 1))
    foreseen = Work("generate", "generate", "requests", 10, tokens_in=100.0, tokens_out=20.0)
    context.ledger = Ledger([foreseen])
    target = stage(context.store, "generate", {})
    assert context.start(target, "generating")
    (target.folder / "part").write(b"replies")
    tokens = {"in": 10 * worked, "out": 2 * worked}
    context.finish(target, ["part"], rows=10, worked=worked, busy=0.25, tokens=tokens)
    facts = target.manifest()
    assert facts["busy_seconds"] == 0.25 and facts["tokens"] == tokens
    assert facts["forecast"].keys() == {"rows", "bytes"} | compared
