"""Only one process can lock a folder. A crash releases the lock."""

import os
import signal
import subprocess
import sys

import pytest

from utils.errors import UserError
from utils.locks import folder_lock

HOLD = """
import sys, time
from utils.locks import folder_lock
with folder_lock(sys.argv[1], "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"training .process {holder.pid}"), folder_lock(tmp_path, "inference"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with folder_lock(tmp_path, "inference"):
        pass


def test_the_lock_never_follows_a_symlink(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(target, folder / ".lock")
    with pytest.raises(UserError, match="link"), folder_lock(folder, "training"):
        pass
    assert target.read_text() == "precious"
