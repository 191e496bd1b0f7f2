"""Write the table of faults in docs/verification.md from the test's list: `python samples/docs_faults.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from docs_families import DOCS, markdown, with_table

sys.path.insert(0, str(DOCS.parent / "tests" / "parity"))
from faults import FAULTS, Fault

PAGE = DOCS / "verification.md"


def table() -> str:
    """Return the table of faults, one per row, in the order of the list."""
    rows = [
        [str(number), fault.what, fault.bundle, _read(fault), _run(fault)] for number, fault in enumerate(FAULTS, 1)
    ]
    return markdown(["", "Fault", "Bundle", "Read", "Run"], rows)


def _read(fault: Fault) -> str:
    return "fails" if fault.read else "-"


def _run(fault: Fault) -> str:
    if fault.run is None:
        return "-"
    check = fault.run if fault.run == "refused" else f"`{fault.run}`"
    return f"{check}, `--against`" if fault.against else check


def page() -> str:
    """Return the text of docs/verification.md with the table of the test's list."""
    return with_table(PAGE.read_text(), Path(__file__).name, table())


if __name__ == "__main__":
    PAGE.write_text(page())
