"""``python -m tests.simulation --seeds 200``: play whole training runs, and look for what breaks.

Each seed is one run: a plan, faults and a schedule, all of which follow from it. A run that breaks
an invariant is printed with its plan, what happened in it, and the line that repeats it. The last
line is a summary; the exit status is 1 if anything broke. ``--planted --seeds 500`` plants bugs
instead, one at a time; the exit status is 1 if one is not found: the suite's test of itself.
"""

from __future__ import annotations

import sys

from .driver import main

if __name__ == "__main__":  # not in the processes of --jobs
    sys.exit(main(prog_name="python -m tests.simulation", standalone_mode=False))
