"""What the tables of finished sweeps share: each collection's ``test.json`` read, two results written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write(name: str, summary: Callable[[dict[str, Any]], Any], table: Callable[[Any], str]) -> None:
    """Write ``results/NAME.json`` and ``.md`` from the sweep's output folder that the command line names.

    summary: of what was found on test queries, by collection. table: the summary as Markdown.
    """
    if len(sys.argv) != 2:
        sys.exit(f"usage: python benchmarks/{name}.py OUTPUT_DIR_OF_THE_SWEEP")
    folder = Path(sys.argv[1])
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/test.json"))}
    if not found:
        sys.exit(f"no finished collection in {folder}: run the sweep first")
    document = summary(found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(document))
    print(table(document))
