import threading

import pytest

from finemill.errors import UserError
from finemill.metrics import symbolic


def test_a_formula_without_end_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "TIMEOUT_S", 0.5)
    assert not symbolic.proven_equal("9", "10^{10^{10^{10}}}")
    monkeypatch.undo()
    assert symbolic.proven_equal(r"\sqrt{8}", r"2\sqrt{2}")


def test_formulas_are_compared_in_threads_too() -> None:
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(symbolic.proven_equal(f"{n}x", f"x*{n}"))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic._stop()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"finemill\[eval\]"):
        symbolic.proven_equal("x", "y + z")
