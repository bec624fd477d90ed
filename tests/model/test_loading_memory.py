"""Loading needs memory only for the tensors that are kept, also if they are converted. A new process measures it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.transformer import WanConfig, WanTransformer
from model.weights import save_safetensors

SIZES = WanConfig(dim=1024, ffn_dim=2048, num_heads=8, num_layers=6)  # 80 million parameters
MEASURE = """
import json, sys, torch
from model.weights import mapping
from model.transformer import PRESETS, WanTransformer
from model.weights.transformer_read import read_transformer

mapping.WINDOW_BYTES = 2**22  # the file has 330 MB; in larger files a piece is a smaller part of it
mapping.MAX_WINDOWS = 100

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
with torch.device("meta"):
    WanTransformer(PRESETS["shapes"])  # the first one imports half of torch
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
model = read_transformer(path, preset="shapes", dtype=dtype)
kept = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps((memory("VmHWM") - before) / kept))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_peak_memory_is_below_1_1_times_the_tensors_kept(tmp_path, suffix):
    """In the worst case stored tensors take twice the memory of the kept ones."""
    state = WanTransformer(SIZES).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"critic": state, "generator": state}, path)
    else:
        save_safetensors(path, state)
    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", MEASURE, str(path), "bfloat16"]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) < 1.1
