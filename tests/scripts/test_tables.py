"""Tables of README and the documentation are what the files of measurements say."""

import pytest
import tables


def test_no_table_is_stale():
    stale = [str(page) for page, _ in tables.stale_pages()]
    assert not stale, f"run `python scripts/tables.py`, which writes {stale}"


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_stale_table_is_found_and_filled(name):
    block = f"before\n<!-- begin: {name} -->\nold\n<!-- end: {name} -->\nafter"
    text = tables.filled(block)
    assert text != block
    assert text.startswith(f"before\n<!-- begin: {name} -->\n\n| ")
    assert text.endswith(f" |\n\n<!-- end: {name} -->\nafter")
    assert tables.filled(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin: unheard -->\n<!-- end: unheard -->", "No table is called"),
        ("<!-- begin: bench -->\n", "Markers do not match"),
        ("<!-- begin: bench -->\n<!-- end: paper -->", "Markers do not match"),
        ("<!-- end: bench -->\n<!-- begin: bench -->\n", "Markers do not match"),
    ],
)
def test_markers_that_make_no_table_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tables.filled(text)


def test_every_file_of_measurements_says_how_it_was_made():
    made = tables.stored("measured.json")
    files = {path.name for path in (tables.ROOT / "docs" / "data").glob("*.json")}
    assert files - {"measured.json", "asserted.json"} == set(made) - {"reproduce"}
    assert all({"command", "machine", "date"} <= set(entry) for entry in made.values())
