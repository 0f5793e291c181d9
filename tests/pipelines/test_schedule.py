import re

import pytest

from finemill.errors import UserError
from finemill.pipelines.schedule import check_schedule, cron_pattern

GOOD = ["0 3 * * *", "*/5 0-6,20-23 1,15 jan-MAR MON-FRI", "05 03 ? * 0", "10/20 * 29 2 *", "0 0 31 2 MON"]
BAD = ["", "banana", "0 3 * *", "99 99 * * *", "60 * * * *", "0 3 * * 7", "0 3 0 * *", "*/0 * * * *", "@daily"]
BAD += ["0 0 3 * * *", "CRON_TZ=UTC 0 3 * * *", "a b c d e", "1-2-3 * * * *", ", * * * *", "-1 * * * *"]


@pytest.mark.parametrize("cron", GOOD)
def test_what_the_controllers_read_is_taken(cron: str) -> None:
    check_schedule(cron, "Europe/Berlin")
    assert re.fullmatch(cron_pattern(), cron)


@pytest.mark.parametrize("cron", BAD)
def test_what_the_controllers_would_refuse_is_refused(cron: str) -> None:
    with pytest.raises(UserError, match="schedule"):
        check_schedule(cron)
    assert not re.fullmatch(cron_pattern(), cron)


@pytest.mark.parametrize("cron", ["0 0 30 2 *", "0 0 31 4,6 ?", "5-3 * * * *", "0 0 * DEC-JAN *"])
def test_what_never_fires_is_refused(cron: str) -> None:
    with pytest.raises(UserError, match=r"never fire|fall"):
        check_schedule(cron)


@pytest.mark.parametrize(
    "name", ["Mars/Base", "", "../../etc/passwd", "/etc/localtime", "Europe", "localtime", "posix/UTC"]
)
def test_a_time_zone_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="time zone database"):
        check_schedule("0 3 * * *", name)
