"""The tables in the documents are those of the recorded results."""

import pytest

from results import tables


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_tables_are_not_stale(path):
    text = path.read_text(encoding="utf-8")
    assert tables.renewed(text) == text, "stale: run make results, and read what the document says of it"


def test_every_folder_of_results_has_its_tables():
    recorded = {log.parents[1] for log in tables.RESULTS.glob("*/*/log.txt")}
    recorded |= {path.parent for path in tables.RESULTS.glob("*/*.json")}
    tabled = {path.parent for path in tables.DOCUMENTS if tables.TABLE.search(path.read_text(encoding="utf-8"))}
    assert tabled >= recorded
