import threading
import time

import pytest

from finemill.components.chat_format.limit import OutOfTimeError, time_limit


def endless() -> None:
    while True:
        pass


def ended(seconds: float) -> list[str]:
    """What becomes of endless code under a limit, and of what follows it."""
    seen = []
    with pytest.raises(OutOfTimeError), time_limit(seconds):
        endless()
    seen.append("ended")
    with time_limit(10):
        time.sleep(2 * seconds)
    seen.append("the next block is whole")
    return seen


def test_endless_code_ends_in_the_main_thread_and_in_others() -> None:
    expected = ["ended", "the next block is whole"]
    assert ended(0.1) == expected
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(ended(0.1)))
    thread.start()
    thread.join()
    assert found == expected
