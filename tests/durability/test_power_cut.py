"""A power cut costs the steps since the last checkpoint: a checkpoint is on the disk before `latest` names it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAVE = """
import sys
from pathlib import Path
from torch import nn
from utils.checkpoint import Checkpoints, KeepPolicy
for how in sys.argv[2:]:
    folder = Path(sys.argv[1]) / how
    folder.mkdir()
    checkpoints = Checkpoints(folder, KeepPolicy(1), background=how == "background")
    for step in (1, 2):
        (folder / f"begin_{step}").unlink(missing_ok=True)
        checkpoints.save(step, {"net": nn.Linear(4, 4)}, {})
        checkpoints.finish()
"""
WAYS = ("foreground", "background")
CALLS = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir"


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with a folder of checkpoints for each way to save, and the calls that made them, as strace has them."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    base = tmp_path_factory.mktemp("power")
    folder, output = base / "checkpoints", base / "trace"
    folder.mkdir()
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(output)]
    command += [sys.executable, "-c", SAVE, str(folder), *WAYS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return folder, output.read_text().splitlines()


def calls_below(folder: Path, lines: list[str]) -> list[str]:
    """The calls that sync, rename and delete below a folder, as `sync NAME`, `rename OLD NEW` and `delete NAME`."""
    calls = []
    for line in lines:
        if str(folder) not in line or "= -1" in line or "resumed>" in line:
            continue
        call = re.search(r"(\w+)\(", line)[1]
        names = [name.replace(f"{folder}/", "") for name in re.findall(rf"{folder}[^\"<>]*", line)]
        if call.startswith("rename"):
            old, new = names[-2:]
            calls.append(f"rename {'temporary' if re.fullmatch(r'[.][0-9a-f]{32}', old) else old} {new}")
        elif "sync" in call:
            name = names[0]
            calls.append(f"sync {'temporary' if re.fullmatch(r'[.][0-9a-f]{32}', name) else name}")
        elif "begin" not in line:
            quoted = re.search(r"\"([^\"]*)\"", line)[1]
            calls.append(f"delete {names[0] if quoted.startswith('/') else f'{names[0]}/{quoted}'}")
    return calls


@pytest.mark.parametrize("how", WAYS)
def test_everything_is_on_the_disk_before_latest_names_it_and_nothing_goes_before(traced, how):
    folder = traced[0] / how
    calls = calls_below(folder, traced[1])
    assert calls.count("rename temporary latest") == 2
    second = calls[calls.index("rename temporary latest") + 1 :]
    named = second.index("rename temporary latest")
    unfinished = ".step_00000002.unfinished"
    placed = second.index(f"rename {unfinished} step_00000002")
    synced = [f"sync {unfinished}/{name}" for name in ("rank_00000.safetensors", "state.json", "manifest.json")]
    synced.append(f"sync {unfinished}")
    assert all(call in second[:placed] for call in synced), second
    assert second.index(f"sync {unfinished}") > max(second.index(call) for call in synced[:-1])
    whole = f"sync {folder}"
    assert whole in second[placed:named] and "sync temporary" in second[placed:named]
    after = second[named + 1 :]
    assert whole in after
    deletes = [index for index, call in enumerate(second) if call.startswith("delete")]
    assert deletes and min(deletes) > named + 1 + after.index(whole), second
    assert all("step_00000001" in second[index] for index in deletes)
