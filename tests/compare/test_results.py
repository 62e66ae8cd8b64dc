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


def test_a_server_has_a_row_for_each_load(tmp_path):
    """The median of its rounds, with that of the ratios to the first variant in each round."""
    rows = []
    for number, (theirs, ours) in enumerate([(10, 15), (30, 15), (20, 40)]):
        for variant, speed in (("vllm", theirs), ("spd", ours)):
            name = f"gpt2 {variant} tp_size=2 added_delay_us=400 round={number}"
            rows += [f"{name} decode | 8 | 16 | {speed} | 3.0 | 4.0 | 5.0 | 6.0 | 640 |"]
            rows += [f"{name} prefill | 1 | 256 | 7.0 | {speed} | 4.0 | 5.0 | 6.0 | 640 |"]
    (tmp_path / "measured.txt").write_text("\n".join(rows))
    *_, decode, prefill = tables.serving_table(tmp_path).splitlines()
    assert decode == "| gpt2, 2 | 0.4 | tokens/s, clients 8 | 20.0 (1.00x) |  | 15.0 (1.50x) |  |"
    assert prefill == "| gpt2, 2 | 0.4 | TTFT, prompt 256, ms | 20.0 (1.00x) |  | 15.0 (1.50x) |  |"
