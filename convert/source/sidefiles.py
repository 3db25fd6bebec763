"""The files of a checkpoint beside its weights that a folded one needs too, by a list of what may travel.

No code travels, no archive, no weights of other formats, nothing that nobody asked for, and no file from outside the folder.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvfold.convert.source.jsonfile import read_json

_NEEDED = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|tokenizer\.model(\.v\d+)?|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|vocab\.txt|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|tekken\.json|[\w.-]+\.tiktoken"
    r"|generation_config\.json|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|(video_)?preprocessor_config\.json|processor_config\.json"
    r"|(?i:([\w-]+[_-])?(licen[cs]e|notice|copying|use[_-]policy)([_-][\w-]+)?(\.(txt|md|pdf))?)"
)
_OURS_OR_WEIGHTS = re.compile(
    r"config\.json|kvfold\.json|README\.md|report\.(json|md|html)|(modeling_kvfold|kvfold_attention)\.py|plots/[\w.-]+\.png"
    r"|[\w.-]+\.safetensors(\.index\.json)?|\..*"
)
"""What is written anew or is about other weights: nobody misses it."""
TEMPLATES = "additional_chat_templates"


@dataclass
class SideFiles:
    """Attributes: files to copy as they are, contents of the others by name (those in a folder of their own, and those that
    lose what they say of code), and the names left behind."""

    copies: list[Path] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def side_files(folder: Path) -> SideFiles:
    """What travels from the checkpoint in `folder`. Raises UserError when a JSON file among it is damaged."""
    found = SideFiles()
    for name in _names(folder):
        path = folder / name
        if not is_needed(name) or not lies_inside(path, folder):
            if not _OURS_OR_WEIGHTS.fullmatch(name):
                found.left.append(name)
        elif path.suffix == ".json":
            said = read_json(path, "download it again, or remove it")
            if "auto_map" in said:  # classes in a file that stays behind
                del said["auto_map"]
                found.texts[name] = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
            else:
                found.copies.append(path)
        elif name.startswith(TEMPLATES):
            found.texts[name] = path.read_text(encoding="utf-8", errors="replace")
        else:
            found.copies.append(path)
    return found


def is_needed(name: str) -> bool:
    """Whether a file of this name, relative to the checkpoint's folder, belongs to a tokenizer, a chat or a licence."""
    return _NEEDED.fullmatch(name) is not None


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a plain file lies in the folder, links followed; those of the Hub's cache may lie among its blobs."""
    if not path.is_file():
        return False
    home, real = folder.resolve(), path.resolve()
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs")


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            yield path.name
        elif path.name == TEMPLATES and not path.is_symlink():
            yield from sorted(f"{TEMPLATES}/{file.name}" for file in path.iterdir())
        elif path.name not in ("plots", "runs") and not path.name.startswith("."):
            yield path.name + "/"
