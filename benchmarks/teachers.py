"""Which teacher judges best, and which does the student learn most from? The table of a teacher_mixes sweep.

    python jobs/sweep.py configs/sweeps/teacher_mixes.yaml      # its head says what comes first
    python benchmarks/teachers.py out/teacher-mixes [--quick]

Reads each collection's ``test.json``; writes ``teachers.json`` and ``teachers.md`` into ``results/``. The
student is the trained model itself, whether the recipe would have returned it or not.
"""

from statistics import mean
from typing import Any

from tested import write

KEYS = ("ndcg@10", "delta", "ci95", "p")


def summary(tested: dict[str, Any]) -> dict[str, Any]:
    """By collection what ``_of_one`` finds."""
    return {"collections": {name: _of_one(document) for name, document in tested.items()}}


def _of_one(tested: dict[str, Any]) -> dict[str, Any]:
    """Of one collection: the untrained student, and by teacher its own order and the student it trained."""
    return {
        "queries": tested["queries"],
        "base": {"ndcg@10": tested["base"]["ndcg@10"]},
        "teachers": {
            row["point"]["teacher"]: {
                "as judge": {key: row["teacher"][key] for key in KEYS},
                "its student": {key: row["candidate"][key] for key in KEYS},
            }
            for row in tested["settings"]
        },
    }


def table(document: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "# Teachers: nDCG@10 on test queries",
        "",
        "Difference to the untrained student with its 95 % interval over queries and p (paired randomisation "
        "test).",
        "",
        "| collection | queries | student before | teacher | as judge | its student |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in document["collections"].items():
        for teacher, systems in found["teachers"].items():
            cells = [
                f"{of['ndcg@10']:.4f} ({of['delta']:+.4f}, {of['ci95'][0]:+.4f} to {of['ci95'][1]:+.4f}, "
                f"p {of['p']:.2g})"
                for of in systems.values()
            ]
            start = f"| {name} | {found['queries']} | {found['base']['ndcg@10']:.4f} | {teacher} | "
            lines.append(start + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def compared(document: dict[str, Any]) -> tuple[float, float]:
    """ndcg@10 of the student of the best teacher and of the untrained one, means over collections."""
    found = document["collections"].values()
    by_teacher: dict[str, list[float]] = {}
    for one in found:
        for teacher, systems in one["teachers"].items():
            by_teacher.setdefault(teacher, []).append(systems["its student"]["ndcg@10"])
    return max(mean(values) for values in by_teacher.values()), mean(c["base"]["ndcg@10"] for c in found)


if __name__ == "__main__":
    write("teachers", __doc__, summary, table, compared)
