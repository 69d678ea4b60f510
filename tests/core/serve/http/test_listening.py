"""Processes that stay outside the jail beside a server."""

from __future__ import annotations

import os
import pwd

import pytest

from mst.serve.http.listening import start_outside


def test_what_stays_outside_under_sudo_is_the_callers_as_if_there_were_no_sudo() -> None:
    if os.geteuid():
        pytest.skip("wants root")
    user = pwd.getpwnam("nobody")
    sudo = {"SUDO_UID": str(user.pw_uid), "SUDO_GID": str(user.pw_gid), "SUDO_USER": "nobody"}
    reading, writing = os.pipe()
    command = ["bash", "-c", f'echo "$(id -u) $(id -G) $HOME" >&{writing}']
    running = start_outside(command, (writing,), {**os.environ, **sudo, "HOME": "/root"})
    os.close(writing)
    with open(reading) as told:
        said = told.read().split()

    assert running.wait(20) == 0
    groups = map(str, os.getgrouplist("nobody", user.pw_gid))
    assert said == [str(user.pw_uid), *groups, user.pw_dir]
