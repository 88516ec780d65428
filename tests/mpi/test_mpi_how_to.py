"""The how-to pages are programs for 3 ranks, and print what they show."""

import how_to_pages
import pytest
from mpi4py import MPI

pytestmark = [
    pytest.mark.mpi(min_size=3),
    pytest.mark.wheels,
    pytest.mark.skipif(MPI.COMM_WORLD.size != 3, reason="the pages are for 3 ranks"),
]


@pytest.mark.parametrize("name", how_to_pages.PAGES)
def test_a_page_prints_what_it_shows(name):
    blocks = how_to_pages.program(name)
    assert [block.language for block in blocks].count("text") > 0, "the page shows no output"
    pairs = MPI.COMM_WORLD.bcast(how_to_pages.run(blocks, name))  # those of rank 0, which prints
    shown, printed = zip(*pairs)
    assert list(printed) == list(shown)


def test_other_output_than_shown_is_found_and_so_is_output_that_is_not_shown():
    page = "```python\nprint(2)\n```\n\n```text\n3\n```\n\n```python\nprint(4)\n```\n"
    assert how_to_pages.run(how_to_pages.blocks_of(page), "a page") == [("3", "2"), ("", "4")]
