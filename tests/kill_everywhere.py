"""kill -9 of a conversion over an older one, before each operation on its files in turn, and --resume behind each.

    python tests/kill_everywhere.py SOURCE WORK [TOKENS]

With TOKENS the conversion is calibrated on them and all its layers are healed at once, a state kept behind each step. The first
resume behind each kill is killed too, each time before another operation.
Each run is a fork of this process, which has imported all there is to import: seconds instead of minutes. The last line is
JSON: `killed`, how many runs, `again`, how many resumes, and `wrong`, what came of those that left or gave anything but the old
or the new checkpoint.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvfold.convert import heal_whole
from kvfold.convert.pipeline import convert
from kvfold.convert.planning.settings import ConvertSettings

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}
EVENTS |= {"shutil.rmtree", "shutil.copyfile"}
KILLED = -signal.SIGKILL
AGAIN = 97
"""A prime: the operations of resumes that are killed are all of so many, one behind each kill of a first run."""


class Counter:
    """An audit hook that counts operations below a path and kills this process before one of them."""

    def __init__(self) -> None:
        self.root, self.left = "", -1
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.left < 0 or event not in EVENTS:
            return
        if any(isinstance(arg, (str, Path)) and str(arg).startswith(self.root) for arg in args[:2]):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], Any]) -> int:
    """The exit code of `work` in a process of its own."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(folder: Path) -> dict[str, str]:
    """Checksums of a folder's files, of kvfold.json what has no timings."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    record = json.loads((folder / "kvfold.json").read_text())
    healed = [layer.get("output_kl") for layer in record["layers"]]
    return {**found, "kvfold.json": json.dumps([record["settings"], healed])}


def main(source: str, work: Path, tokens: str | None = None) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # which a kill has no need of
    heal_whole.KEEP_SECONDS = 0.0
    work.mkdir()
    old, new, out = work / "old", work / "new", work / "out"
    healed: dict[str, Any] = {"calibrate": tokens, "heal_window": "all", "heal_steps": 3, "heal_batch_tokens": 64}
    wanted = ConvertSettings(to="gqa", kv_heads=2, device="cpu", **(healed if tokens else {}))
    convert(source, old, ConvertSettings(to="gqa", kv_heads=1, device="cpu"))
    convert(source, new, wanted)
    before, after = digest(old), digest(new)
    counter, killed, again, wrong = Counter(), 0, 0, []
    counter.root = str(out)
    while True:
        for path in work.glob("out*"):
            shutil.rmtree(path)
        shutil.copytree(old, out)

        def interrupted(operation: int = killed + 1, resume: bool = False) -> None:
            counter.left = operation
            convert(source, out, wanted, overwrite=True, resume=resume)

        if forked(interrupted) != KILLED:
            break
        killed += 1
        if not out.exists() or digest(out) not in (before, after):
            wrong.append(f"kill {killed}: neither the old nor the new")
        if tokens:
            again += forked(partial(interrupted, 1 + 7 * killed % AGAIN, resume=True)) == KILLED
        code = forked(lambda: convert(source, out, wanted, resume=True, overwrite=True))
        if code or digest(out) != after or len(list(work.glob("out*"))) != 1:
            wrong.append(f"kill {killed}: resume gave {code} and {sorted(p.name for p in work.glob('out*'))}")
    if digest(out) != after:
        wrong.append("without a kill: not the new")
    print(json.dumps({"killed": killed, "again": again, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
