"""The model card of a folded checkpoint: what it is, what was measured, how it was made, how to load it.

Everything that kvfold writes stands between markers. A card that is already there is updated inside them, and what was
written by hand around them stays.
"""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kvfold.convert.families.views import PART_OF, read_as
from kvfold.convert.output import record
from kvfold.convert.output.record import said_of_biases
from kvfold.convert.publishing.escape import all_markdown, markdown
from kvfold.convert.source.data import TEXT_SUFFIXES
from kvfold.convert.source.jsonfile import read_json
from kvfold.errors import UserError

CARD = "README.md"
SOURCE_NAME = "kvfold"
_SECTION = re.compile(r"<!-- kvfold:(\w+) -->(?:(?!<!-- kvfold:).)*?<!-- /kvfold:\1 -->", re.DOTALL)
"""What begins another one ends the search, or a text of openings alone would be searched once for each."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+ -]{0,80}")
_LINK = re.compile(r"(https://[\w./%#?=&-]+|[\w.-]+)")
_TARGET = "design kv_heads kv_rank rope_dim method grouping layout"
_SETTINGS = "kv_budget q_rank dtype seed"
_RUN_COUNTS = {"tokens": "tokens", "distinct_tokens": "of them distinct", "steps": "steps", "parameters_trained": "parameters"}
_RECIPE_FACTS = {
    "data": "on",
    "window": "window",
    "kl_weight": "weight of the KL from the source",
    "ce_weight": "weight of the cross-entropy",
    "learning_rate": "learning rate",
}


@dataclass(frozen=True)
class Licence:
    """As the Hub writes it: `license`, and for `other` also its name and where it can be read."""

    license: str
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for what is no name of a licence: it goes into the card's metadata, and to the Hub."""
        link = self.license_link or "LICENSE"
        for what, text, fits in (
            ("licence", self.license, _NAME.fullmatch(str(self.license))),
            ("licence name", self.license_name or "x", _NAME.fullmatch(str(self.license_name or "x"))),
            ("licence link", link, _LINK.fullmatch(str(link))),
        ):
            if not isinstance(text, str) or not fits:
                raise UserError(f"{text!r:.80} is no {what}: give --license as the Hub writes it (apache-2.0, mit, llama3.1)")


@dataclass(frozen=True)
class Facts:
    """All that a card is made from.

    Attributes:
        repo_id: where it will lie, user/name.
        base_model: Hub id of the source, None when only a local folder is known.
        report: a report.json, with the row of this model in `model`.
        table: its main table in Markdown, with the source and this model alone, and `legend` that explains it.
        plot: a plot's path in the repository, None without one.
    """

    out: Path
    repo_id: str
    base_model: str | None
    licence: Licence
    report: dict[str, Any]
    model: dict[str, Any]
    table: str
    legend: str
    plot: str | None


def make_card(facts: Facts, existing: str | None) -> str:
    """The whole card. `existing` is the one it replaces: its hand-made text, metadata and results are kept.

    What others wrote (names, settings, a licence) stands in it as plain text; `facts.table` and `facts.legend` are Markdown.

    Raises:
        UserError: kvfold.json or the existing card's metadata cannot be read.
    """
    record, config = read_record(facts.out), read_json(facts.out / "config.json")
    within = PART_OF in read_as(config)
    remote = "auto_map" in config
    template = files("kvfold.convert.publishing").joinpath("card.md.jinja").read_text(encoding="utf-8")
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    made = ModelCard.from_template(
        _metadata(facts, record, existing),
        template_str=template,
        name=markdown(facts.repo_id.split("/")[-1]),
        summary=_summary(facts, record),
        table=facts.table.strip(),
        legend=facts.legend,
        plot=facts.plot,
        report=all_markdown(facts.report),
        model=all_markdown(facts.model),
        text=markdown(text_name(facts.report["settings"]["on"])),
        repo_id=facts.repo_id,
        remote=remote,
        extra=", trust_remote_code=True" if remote else "",
        architecture=architecture if architecture.isidentifier() else "transformers",
        loader=architecture if within and architecture.isidentifier() else "AutoModelForCausalLM",
        version=markdown(record["version"]),
        making=_making(record, facts.base_model),
        limits=_limits(facts, within),
    )
    return str(made) if existing is None else _updated(made, existing)


def read_record(out: Path) -> dict[str, Any]:
    """kvfold.json of a folded checkpoint. Raises UserError when it is missing or damaged."""
    return record.read_record(out, "push what kvfold convert wrote", "convert again")


def hand_made(card: str) -> list[str]:
    """The lines that are not kvfold's: neither metadata nor inside the markers, nor empty."""
    text = _SECTION.sub("", parse_card(card).text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def newer_of(ours: str | None, theirs: str | None, out: Path) -> str | None:
    """The card to update, of the folder's and the Hub's: the one that has all that was written by hand.

    Raises:
        UserError: each has hand-made lines that the other lacks.
    """
    if ours is None or theirs is None:
        return ours if theirs is None else theirs
    here, there = set(hand_made(ours)), set(hand_made(theirs))
    if here <= there:
        return theirs
    if there <= here:
        return ours
    raise UserError(
        f"{out / CARD} and the card on the Hub were both edited: copy the Hub's hand-made lines into the file, or delete the "
        "file to keep the Hub's"
    )


def text_name(origin: str) -> str:
    """A text as the card names it: a Hub dataset whole, of a local path the last part, whether it is still there or not."""
    path = Path(origin.rpartition(":")[0] or origin)
    local = path.suffix in (*TEXT_SUFFIXES, ".safetensors") or origin.startswith((".", "/", "~")) or path.exists()
    return origin.rstrip("/").split("/")[-1] if local else origin


def read_card(file: Path) -> str | None:
    """A card's text, None when there is none. Raises UserError when it is no text."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} is no text ({error}): mend it, or delete it") from None


def parse_card(card: str) -> ModelCard:
    """A card of whatever quality. Raises UserError when the metadata at its head is no YAML."""
    try:
        return ModelCard(card, ignore_metadata_errors=True)
    except Exception as error:  # of yaml, and of the client's own checks
        line = str(error).splitlines()[0]
        raise UserError(f"the metadata at the head of {CARD} cannot be read ({line}): mend it, or delete the card") from None


def _updated(made: ModelCard, existing: str) -> str:
    """`existing` with its sections renewed; one that has none gets all of them at its end."""
    old = parse_card(existing)
    sections = {match[1]: match[0] for match in _SECTION.finditer(made.text)}
    if _SECTION.search(old.text):
        text = _SECTION.sub(lambda match: sections.get(match[1], match[0]), old.text)
    else:
        text = old.text.rstrip() + "\n\n" + "\n\n".join(sections.values()) + "\n"
    return f"---\n{made.data.to_yaml()}\n---\n{text if text.startswith(chr(10)) else chr(10) + text}"


def _metadata(facts: Facts, record: dict[str, Any], existing: str | None) -> ModelCardData:
    """Ours over what stands there; a licence, tags and results of others are kept."""
    old: Any = parse_card(existing).data if existing else ModelCardData()
    results = [result for result in old.eval_results or [] if result.source_name != SOURCE_NAME]
    kept = {key: value for key, value in old.to_dict().items() if key != "model-index"}
    theirs = [tag for tag in old.tags if isinstance(tag, str)] if isinstance(old.tags, list) else []
    tags = dict.fromkeys([*theirs, SOURCE_NAME, "kv-cache", record["target"]["to"]])
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": facts.base_model,
        **kept,
        "license": facts.licence.license,
        "license_name": facts.licence.license_name,
        "license_link": facts.licence.license_link,
        "tags": list(tags),
        "model_name": facts.repo_id.split("/")[-1],
    }
    return ModelCardData(eval_results=results + _results(facts), **values)


def _results(facts: Facts) -> list[EvalResult]:
    on = facts.report["settings"]["on"]
    model = facts.model
    hub_dataset = text_name(on) == on and "/" in on and ".safetensors" not in on
    data: dict[str, Any] = {
        "dataset_type": on.split(":")[0] if hub_dataset else "text",
        "dataset_name": markdown(text_name(on)),
    }
    measured = {
        "perplexity": ("Perplexity", model["perplexity"]),
        "nll": ("NLL, nats per token", model["nll"]),
        "damage": ("Damage: NLL above the source's, nats per token", model["damage_nats"]),
        "kl": ("KL from the source, nats per token", model["kl"]),
        "top1_agreement": ("Top-1 agreement with the source", model["top1_agreement"]),
        "cache_bytes_per_token": ("KV cache, bytes per token", model["cache_bytes_per_token"]),
    }
    common: dict[str, Any] = {"task_type": "text-generation", "source_name": SOURCE_NAME}
    common["source_url"] = f"https://huggingface.co/{facts.repo_id}"
    results = [
        EvalResult(**common, **data, metric_type=kind, metric_name=name, metric_value=round(value, 6))
        for kind, (name, value) in measured.items()
    ]
    for task, found in model["tasks"].items():
        for metric, value in found["metrics"].items():
            place: dict[str, Any] = {"dataset_type": markdown(task), "dataset_name": markdown(task)}
            results.append(EvalResult(**common, **place, metric_type=metric, metric_name=metric, metric_value=value["value"]))
    return results


def _summary(facts: Facts, record: dict[str, Any]) -> str:
    source = facts.report["source"]
    kept = facts.model["cache_bytes_per_token"] / source["cache_bytes_per_token"]
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "A language model"
    some = record["target"].get("folded_layers")
    where = f" in layers {', '.join(map(str, some))}" if some else ""
    return (
        f"{base} with its attention folded into {record['target']['to'].upper()}{where}: the KV cache takes "
        f"{facts.model['cache_bytes_per_token']:,.0f} bytes per token in {facts.report['settings']['dtype']}, {kept:.1%} of "
        f"the source's {source['cache_bytes_per_token']:,.0f}, at a damage of {facts.model['damage_nats']:+.4f} nats per token."
    )


def _making(record: dict[str, Any], base_model: str | None) -> list[str]:
    settings, target = record["settings"], record["target"]
    revision = f" at revision {record['revision']}" if record.get("revision") else ""
    source = base_model or text_name(str(record["source"]))
    chosen = [f"{key} {target[key]}" for key in _TARGET.split() if target.get(key)]
    chosen += [f"{key} {settings[key]}" for key in _SETTINGS.split() if settings.get(key) is not None]
    lines = [f"Source: {source}{revision}.", f"Fold: {target['to']}, {', '.join(chosen)}."]
    if record["calibration_tokens"]:
        origin = settings.get("calibrate") or "a text"
        text = "text that the source wrote itself" if origin.partition(":")[0] == "self" else text_name(origin)
        lines.append(f"Calibration: {record['calibration_tokens']:,} tokens of {text}.")
        steps, size = settings.get("heal_steps", 0), settings.get("heal_batch_tokens", 0)
        whole = "output_kl" in (record.get("layers") or [{}])[0]
        where = "of all layers" if whole else "per layer"
        lines.append(f"Healing: {steps} steps {where} of {size:,} tokens." if steps else "No healing.")
    else:
        lines.append("No calibration text and no healing: each layer was folded from its weights alone.")
    if biases := said_of_biases(record.get("layers") or []):
        lines.append(biases)
    lines += [_uptraining(run) for run in record.get("uptraining") or []]
    if not record.get("uptraining"):
        lines.append("No uptraining: the model was not trained end to end after the fold.")
    return [markdown(line) for line in lines]


def _uptraining(run: dict[str, Any]) -> str:
    """One entry of `uptraining` in kvfold.json."""
    recipe = run.get("recipe") or {}
    facts = [str(recipe["train"])] if "train" in recipe else []
    facts += [f"{run[key]:,} {name}" for key, name in _RUN_COUNTS.items() if run.get(key) is not None]
    facts += [f"{name} {recipe[key]}" for key, name in _RECIPE_FACTS.items() if recipe.get(key)]
    return f"Uptraining: {', '.join(facts)}."


def _limits(facts: Facts, within: bool) -> list[str]:
    text, context = markdown(text_name(facts.report["settings"]["on"])), facts.report["position_edges"][-1]
    lines = [
        f"The damage is known on {text} and up to {context:,} tokens of context. Other text, other languages "
        "and longer contexts may suffer more: measure on your own with `kvfold evaluate`.",
        "What the source cannot do, and what it should not be used for, holds here too.",
    ]
    if within:
        lines.append(
            "Its language model was folded, and calibrated and measured on text alone: what becomes of images, video or sound "
            "is not known."
        )
    if facts.model["damage_nats"] > 0.1:
        lines.append("At this damage uptraining is advisable before use.")
    return lines
