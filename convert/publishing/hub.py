"""`kvfold push`: the folder of a folded checkpoint, with its card, to the Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or of httpx2, whichever the client was built on
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

import kvfold
from kvfold.convert.output.files import write_whole
from kvfold.convert.publishing.card import CARD, Licence, parse_card, read_card
from kvfold.convert.source.jsonfile import read_json
from kvfold.convert.source.sidefiles import is_needed, lies_inside
from kvfold.errors import ConversionError, UserError

_UPLOADED = re.compile(
    r"config\.json|kvfold\.json|README\.md|report\.(json|md|html)|(modeling_kvfold|kvfold_attention)\.py|adapter_config\.json"
    r"|[\w.-]+\.safetensors(\.index\.json)?|([\w-]+/)*[\w.-]+\.(png|jpe?g|gif|svg|webp)|runs/([\w.-]+/)*events\.out\.[\w.-]+"
)
"""What goes to the Hub of a checkpoint's folder, beside what `sidefiles` says that it needs."""


def refuse_name(repo_id: str) -> None:
    """Raise UserError unless the name is one that the Hub takes, user/name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id} is no name for the Hub ({' '.join(str(error).split())}): give user/name") from None
    if "/" not in repo_id:
        raise UserError(f"{repo_id} names no user or organisation: give user/{repo_id}")


def is_name(text: str) -> bool:
    """Whether this can be a repository's name, with or without its owner."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def files_of(out: Path) -> tuple[list[str], list[str]]:
    """What would be uploaded, and what stays at home, as paths in the repository."""
    found = [path.relative_to(out).as_posix() for path in sorted(out.rglob("*")) if not path.is_dir()]
    uploaded = [n for n in found if (_UPLOADED.fullmatch(n) or is_needed(n)) and lies_inside(out / n, out)]
    return uploaded, [n for n in found if n not in uploaded and not n.startswith(".")]


def refuse_code(out: Path) -> None:
    """Raise UserError when what would be uploaded has whoever loads it run other code than kvfold's own."""
    from kvfold.convert.layouts import kvfold as own

    uploaded, codes = files_of(out)[0], own.files()
    homes = {path.name: path for path in own.TRAVELLING}
    for name in uploaded:
        if name in codes and (out / name).read_text(encoding="utf-8", errors="replace") != codes[name]:
            raise UserError(
                f"{out / name} is not as kvfold {kvfold.__version__} writes it, and whoever loads the checkpoint may run it: "
                f"put kvfold's own in its place (cp {quote(str(homes[name]))} {quote(str(out))}), or push with the version of "
                "kvfold that wrote it"
            )
        if not name.endswith("config.json"):
            continue
        named = read_json(out / name, "get it again, or remove it").get("auto_map")
        if named and not (name == "config.json" and named == own.code() and codes.keys() <= set(uploaded)):
            raise UserError(
                f"{out / name} names code that is not kvfold's (auto_map), and whoever loads the checkpoint may run it: take "
                "auto_map out of that file, or convert the source again"
            )


def card_on_hub(repo_id: str, revision: str | None) -> str | None:
    """The card that lies there, None when there is none.

    Raises:
        UserError: no token, or the Hub does not answer.
    """
    api = HfApi()
    with _explained(repo_id):
        api.whoami()
        if not api.file_exists(repo_id, CARD, revision=revision):
            return None
        return Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(encoding="utf-8")


def licence_of(out: Path, source: str, base_model: str | None) -> Licence:
    """The licence that binds a folded checkpoint: what its own card has already, or the source's, here or on the Hub.

    Args:
        out: the folded checkpoint.
        source: local folder or Hub id that it was folded from.
        base_model: Hub id of the source, None when it is not known.

    Raises:
        UserError: none is stated, it could not be looked up, or the source is gated and its terms have to be read.
    """
    remedy = "give it with --license, as the Hub writes it (apache-2.0, mit, llama3.1, other)"
    for folder in (out, Path(source)):
        card = read_card(folder / CARD)
        if card is not None and (found := _stated(parse_card(card).data)):
            return found
    if base_model is None:
        raise UserError(f"the licence of {source} is not known, no {CARD} there states one: {remedy}")
    try:
        info = HfApi().model_info(base_model)
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"the licence of {base_model} could not be looked up ({type(error).__name__}): {remedy}") from None
    found = _stated(info.card_data)
    if info.gated:
        stated = f" ({found.license_name or found.license})" if found else ""
        raise UserError(
            f"{base_model} is gated: its terms{stated} bind what you publish. Read them, then confirm with --license NAME"
        )
    if found is None:
        raise UserError(f"the card of {base_model} states no licence: {remedy}")
    return found


def _stated(data: Any) -> Licence | None:
    """The licence in a card's metadata."""
    return Licence(data.license, data.license_name, data.license_link) if data and data.license else None


def push(out: Path, repo_id: str, card: str, private: bool = False, revision: str | None = None) -> str:
    """Create the repository if need be, write the card into `out`, upload the folder; returns the commit's address.

    Raises:
        UserError: no network, no right to write there, or the repository is public and `private` was asked for.
        ConversionError: the upload broke off; the next one skips what has arrived.
    """
    api = HfApi()
    with _explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} exists and is public: make it private in its settings, or leave --private out")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    write_whole(out / CARD, card)
    message = "Upload a checkpoint folded by kvfold"
    wanted, _ = files_of(out)
    with _explained(repo_id):
        try:
            done = api.upload_folder(
                repo_id=repo_id, folder_path=out, revision=revision, commit_message=message, allow_patterns=wanted
            )
        except RuntimeError as error:
            raise ConversionError(f"the upload to {repo_id} broke off ({error}): repeat the command") from None
    return done.commit_url


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn the Hub client's errors into one line with a remedy."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("no token for the Hub: run `hf auth login` with a token that may write, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        remedies = {
            401: "the token is not valid: run `hf auth login` again",
            403: "the token may not write there: use one with write access to that user or organisation",
            404: "there is no such user or repository, or the token may not see it",
        }
        line = " ".join((error.server_message or str(error)).split())
        raise UserError(f"{repo_id}: {remedies.get(code, f'the Hub refused ({code}): {line}')}") from None
    except (OfflineModeIsEnabled, HTTPError):
        raise UserError(f"{repo_id}: the Hub did not answer: check the network, or try with --dry-run") from None
