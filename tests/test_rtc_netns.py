"""A video over a network that loses packets, between two processes in namespaces of their own."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests import netns
from tests.fakes import in_a_quiet_moment

LACK = netns.missing()
SECONDS = 60 if os.environ.get("LIVESTYLE_SOAK") == "1" else 15


@pytest.mark.skipif(bool(LACK), reason=LACK or "")
@in_a_quiet_moment
def test_two_percent_random_loss_stalls_the_picture_for_half_a_second_at_most() -> None:
    with netns.cable() as (here, there):
        for end in (here, there):
            end.lose(2)
        publisher = here.python("-m", "tests.rtc_loss", "publish")
        viewer = there.python("-m", "tests.rtc_loss", "view", str(SECONDS))
        try:
            pass_on(publisher, viewer)
            pass_on(viewer, publisher)
            assert viewer.stdout
            report = json.loads(viewer.stdout.readline())
        finally:
            for process in (publisher, viewer):
                process.communicate("\n", timeout=10)
    print(report)
    assert max(report["gaps"]) <= 0.5, report
    assert report["frames"] >= 0.95 * 30 * SECONDS, report
    assert report["nacked"] >= 0.01 * report["released"], report  # it did lose packets


def pass_on(one: subprocess.Popen[str], other: subprocess.Popen[str]) -> None:
    """The offer, or the answer."""
    assert one.stdout
    print(one.stdout.readline(), end="", file=other.stdin, flush=True)
