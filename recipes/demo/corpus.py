"""The demo's text: the source code of Python's standard library, read from the running interpreter.

Nothing of it is shipped. `HELDOUT` names modules that neither the tokenizer nor the model has seen; they exist in every
Python from 3.10 on, though their text differs a little from version to version, and the demo's numbers with it.
"""

import sysconfig
from collections.abc import Iterable
from pathlib import Path

_HELDOUT = "argparse configparser csv dataclasses difflib fractions heapq shlex statistics tarfile textwrap zipfile"
_CALIBRATION = """ast asyncio calendar cmd collections concurrent copy ctypes datetime email ftplib functools gettext http
imaplib inspect ipaddress json locale logging mailbox multiprocessing pathlib pickle platform plistlib pprint queue random
sched shutil smtplib socket sqlite3 ssl string subprocess tempfile threading trace typing unittest urllib uuid wave weakref
xml zipapp"""
HELDOUT = tuple(_HELDOUT.split())
# Calibration text is drawn from modules the model was trained on, as a user calibrates on text like the pretraining data.
CALIBRATION = tuple(_CALIBRATION.split())
# Tests and generated tables would outweigh the library itself.
_SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}


def standard_library(modules: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> list[str]:
    """The source files of the running Python's standard library, one string a file, in a fixed order.

    Args:
        modules: top-level module names to read; all of them when None.
        exclude: top-level module names to leave out.

    Raises:
        FileNotFoundError: this Python comes without its library's source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    wanted, unwanted = (None if modules is None else set(modules)), set(exclude)
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts) or parts[0] in unwanted or (wanted is not None and parts[0] not in wanted):
            continue
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not texts:
        raise FileNotFoundError(f"no standard library source under {root}: use a Python installed with its library's .py files")
    return texts
