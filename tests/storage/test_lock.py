import subprocess
import sys
import threading
import time

import pytest

from finemill.errors import TemporaryError
from finemill.storage import lock
from finemill.storage.store import hold_lock


def test_one_holder_at_a_time(store: str) -> None:
    name = f"{store}/locks/one"
    inside, together = 0, []

    def hold() -> None:
        nonlocal inside
        with hold_lock(name):
            inside += 1
            together.append(inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1, 1, 1, 1]


def test_lock_held_by_another_for_too_long_is_worth_another_attempt(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_TIMEOUT_S", 0.2)
    with hold_lock(f"{store}/locks/one"):
        with pytest.raises(TemporaryError, match="try again"), hold_lock(f"{store}/locks/one"):
            pass
        with hold_lock(f"{store}/locks/other"):
            pass


def test_lock_object_of_a_holder_that_died_is_taken_over_by_one(s3_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{s3_store}/locks/one"
    dead = hold_lock(name)
    dead.__enter__()
    monkeypatch.setattr(lock, "EXPIRY_S", -1.0)
    with hold_lock(name):
        monkeypatch.setattr(lock, "EXPIRY_S", 60.0)
        monkeypatch.setattr(lock, "WAIT_TIMEOUT_S", 0.2)
        # The dead holder comes back to life: it must not release the new holder's lock.
        dead.__exit__(None, None, None)
        with pytest.raises(TemporaryError, match="held by another run"), hold_lock(name):
            pass


def test_lock_file_of_a_killed_process_is_free(folder_store: str) -> None:
    name = f"{folder_store}/locks/one"
    script = f"""
import time
from finemill.storage.store import hold_lock
with hold_lock({name!r}):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    process.stdout.close()
    with hold_lock(name):
        pass
