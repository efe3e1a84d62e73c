"""The figures of README and docs are those of docs/results, on every page."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
from types import ModuleType

import pytest
from places import ROOT

TABLE = re.compile(r"(?P<above>[^\n]*)\n\n(?P<table>(?:\|.*\n)+)")
DECIMAL = re.compile(r"[+−]?\d+\.\d+(?: [±→].*)?")
MARKED = re.compile(r"<!-- (figures|by hand): .+ -->")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    specification = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_page_shows_the_figures_that_were_measured(figures):
    for page in figures.pages():
        text = page.read_text(encoding="utf-8")
        assert figures.filled(text) == text, f"{page.name}: python docs/figures.py writes it anew"


def test_a_figure_or_a_table_that_is_not_what_was_measured_is_put_right(figures):
    measured = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    text = "It fell to <!-- figure: quickstart.after.distinct_2 -->9.999, "
    assert figures.filled(text) == text.replace("9.999", f"{measured['after']['distinct_2']:.3f}")
    cells = "| 0.9 | 0.9 | 0.9 |\n" * 7
    head = "<!-- figures: reward models -->\n\n| trained | reached | linear |\n|---|---:|---:|\n"
    rows = figures.filled(head + cells).removeprefix(head).splitlines()
    assert rows[0] == "| 0.9 | 0.869 | 0.806 |"


def test_figures_that_nobody_measured_and_tables_of_another_size_are_refused(figures):
    with pytest.raises(KeyError, match=r"there is no figure 'quickstart\.after\.beauty'"):
        figures.filled("<!-- figure: quickstart.after.beauty -->1.0")
    with pytest.raises(ValueError, match="there is no table 'beauty'"):
        figures.filled("<!-- figures: beauty -->\n\n| a |\n|---|\n| 1 |\n")
    with pytest.raises(ValueError, match="has 1 rows on a page, of 7"):
        figures.filled("<!-- figures: reward models -->\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")


def test_every_table_of_decimals_says_where_they_come_from(figures):
    for page in figures.pages():
        for found in TABLE.finditer(page.read_text(encoding="utf-8")):
            cells = [cell.strip() for cell in found["table"].replace("\n", "|").split("|")]
            decimals = [cell for cell in cells if DECIMAL.fullmatch(cell)]
            assert len(decimals) < 4 or MARKED.fullmatch(found["above"]), f"{page.name}: {found['table'][:80]}"


def test_every_file_of_results_is_named_on_a_page(figures):
    pages = "".join(page.read_text(encoding="utf-8") for page in figures.pages())
    for path in (ROOT / "docs" / "results").iterdir():
        assert f"results/{path.name}" in pages, path.name


def test_the_examples_of_the_script_hold(figures):
    results = doctest.testmod(figures)
    assert results.attempted > 0
    assert results.failed == 0
