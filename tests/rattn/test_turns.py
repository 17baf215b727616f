"""Trainings that name the same file go one after another."""

import fcntl
import types

from rattn import turns
from rattn.turns import locked, turn


def free(path):
    with path.open("w") as file:
        return locked(file)


def test_a_turn_begins_when_the_one_before_it_ends(tmp_path, monkeypatch):
    path, said = tmp_path / "lock", []
    with path.open("w") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        # A clock that stands at 0 and at 7 s, and a first wait in which the other training ends.
        ends = types.SimpleNamespace(
            monotonic=iter([0, 7]).__next__, time_ns=lambda: 1, sleep=lambda _: fcntl.flock(before, fcntl.LOCK_UN)
        )
        monkeypatch.setattr(turns, "time", ends)
        with turn(path, stopped=lambda: False, say=said.append):
            assert not free(path)
    assert free(path)
    assert said == ["Compiled; waiting for another training to end …", "Waited 7 s."]


def test_who_waits_longest_comes_next(tmp_path, monkeypatch):
    """Also past one that was killed in the line; who came later is not waited for."""
    path = tmp_path / "lock"
    killed, longer, later = (tmp_path / f"lock.{when:020d}-7" for when in (1, 2, 4))
    killed.touch()
    with longer.open("w") as waits, later.open("w") as came_later:
        for file in (waits, came_later):
            fcntl.flock(file, fcntl.LOCK_EX)
        slept = []

        def sleep(_):
            assert free(path)
            slept.append(longer.exists())
            fcntl.flock(waits, fcntl.LOCK_UN)

        monkeypatch.setattr(turns, "time", types.SimpleNamespace(monotonic=lambda: 0, time_ns=lambda: 3, sleep=sleep))
        with turn(path, stopped=lambda: False, say=lambda _: None):
            assert slept == [True]
            assert not free(path)
            assert sorted(tmp_path.iterdir()) == [path, later]


def test_who_is_told_to_stop_waits_no_longer(tmp_path):
    path = tmp_path / "lock"
    with path.open("w") as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        with turn(path, stopped=lambda: True, say=lambda _: None):
            pass


def test_nobody_waits_without_a_file():
    with turn(None, stopped=lambda: False, say=lambda _: None):
        pass
