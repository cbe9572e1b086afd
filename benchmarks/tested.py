"""What the tables of finished sweeps share: each collection's ``test.json`` read, two results written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import RESULTS, parser, report


def write(
    name: str,
    description: str | None,
    summary: Callable[[dict[str, Any]], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    compared: Callable[[dict[str, Any]], tuple[float, float]],
) -> None:
    """Write ``results/NAME.json`` and ``.md`` from the sweep's output folder that the command line names.

    summary: of what was found on test queries, by collection. table: the summary as Markdown. compared:
    ndcg@10 of ours and of what it is held against, means over collections; for the last line.
    """
    arguments = parser(description)
    arguments.add_argument("folder", type=Path, help="output_dir of the sweep")
    given = arguments.parse_args()
    found = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(given.folder.glob("*/test.json"))
    }
    if not found:
        sys.exit(f"no finished collection in {given.folder}: run the sweep first")
    document = summary(found)
    page = table(document)
    print(page)
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(page)
    ours, peer = compared(document)
    seeds = [{row["seeds"] for row in tested["settings"]} for tested in found.values()]
    report(
        name,
        quick=given.quick,
        ratio=ours / peer,
        ours=ours,
        peer=peer,
        unit="ndcg@10",
        equal=all(len(counts) == 1 for counts in seeds),  # as many of every setting, on the same queries
        **document,
    )
