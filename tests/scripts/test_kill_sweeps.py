"""`scripts/kill_sweeps.py`: a few kills, and a store that would not be the same."""

import kill_sweeps
import pytest

pytestmark = pytest.mark.slow


def test_stores_are_the_same_after_kills(capsys):
    assert kill_sweeps.main(["--kills", "3", "--seed", "1"]) == 0
    assert "files the same; 3 kills" in capsys.readouterr().out


def test_a_store_that_differs_is_found(monkeypatch, capsys):
    original, calls = kill_sweeps.files_of, []

    def files_of(store):
        calls.append(store)
        found = original(store)
        if len(calls) > 1:
            found.pop(next(name for name in found if name.startswith("losses/c")))
        return found

    monkeypatch.setattr(kill_sweeps, "files_of", files_of)
    assert kill_sweeps.main(["--kills", "1"]) == 1
    assert "differs after 1 kills: ['losses/c" in capsys.readouterr().out
