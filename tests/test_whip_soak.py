"""Publishers and viewers that come and go by the hundred leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.whip_client import NETWORK

pytestmark = NETWORK

CYCLES = 200 if os.environ.get("LIVESTYLE_SOAK") else 40
GROWTH_MB = 25.0


def test_connections_that_come_and_go_leave_nothing_behind() -> None:
    command = [sys.executable, "-m", "tests.soak", str(CYCLES)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout)
    print(CYCLES, before, after)
    assert after["tasks"] <= before["tasks"]
    assert after["threads"] <= before["threads"]
    assert after["fds"] <= before["fds"]
    assert after["MB"] - before["MB"] < GROWTH_MB
