"""Look at a cluster before money is spent: what would stop a job with this config, and what to change.

    python jobs/doctor.py configs/NAME.yaml [key=value ...] [--dry-run]

Exit code 0: nothing stands in the way (warnings may be there). 1: problems. 2: this command is wrong. What it
writes to ``output_dir`` and ``store`` to try them is removed again.
"""

import sys

from retrieval_ray.errors import UserError
from retrieval_ray.stages import doctor, job


def look(visit: doctor.Visit, until: str | None) -> str | None:
    """Print the report."""
    if until is not None:
        raise UserError("--until: this job has no stages")
    if visit.dry_run:
        print("would look at every node: versions, source, storage, models, disks, clocks, bandwidth")
        return None
    text, fit = doctor.examine(visit.config)
    print(text, flush=True)
    if not fit:
        sys.exit(1)
    return None


if __name__ == "__main__":
    job.main(look, "Check a cluster.", enter=doctor.ready)
