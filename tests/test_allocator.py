"""Memory that tensors have left is kept for the next ones."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from kvfold.allocator import hold_memory
if sys.argv[1] == "held":
    hold_memory()
import torch
def fill():
    torch.empty(40 << 20, dtype=torch.uint8).fill_(1)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own ways elsewhere")
def test_pages_are_not_made_anew_for_every_tensor() -> None:
    """Forty times 40 MiB are 409,600 pages of 4 KiB. An aligned tensor may miss what one of its size has left a few times."""
    faults = {}
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}  # of another test
    for way in ("given back", "held"):
        command = [sys.executable, "-c", FAULTS, way]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        faults[way] = int(done.stdout)
    assert faults["given back"] > 400_000 and faults["held"] < faults["given back"] / 2, faults
