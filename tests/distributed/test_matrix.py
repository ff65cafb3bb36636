"""The whole launcher matrix, an hour on two cores, and its table in docs/launchers.md, which is written here too."""

import matrix
import pytest
from records.files import replace_section, update_section
from runs import ROOT


PAGE = ROOT / "docs" / "launchers.md"


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_mode_agrees_with_one_process():
    assert matrix.failed_modes(matrix.run_all()) == []


@pytest.mark.slow
def test_the_table_is_written_from_the_record():
    update_section(PAGE, "distributed", matrix.table(matrix.read()))


def test_the_table_is_that_of_the_committed_record():
    page = PAGE.read_text()
    assert replace_section(page, "distributed", matrix.table(matrix.read())) == page, "run `make results`"
