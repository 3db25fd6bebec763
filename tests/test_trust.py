"""Sources that are hostile, damaged or unlucky: what comes out is the model that transformers reads, or nothing."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvfold.convert.layouts import deepseek_v3
from kvfold.convert.layouts import kvfold as kvfold_layout
from kvfold.convert.layouts import source as source_layout
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings, parse_yaml
from kvfold.convert.publishing.escape import markdown, visible
from kvfold.convert.publishing.hub import files_of
from kvfold.convert.source.checkpoint import INDEX, SINGLE
from kvfold.convert.source.data import load_tokenizer, sample_from_source
from kvfold.errors import UserError
from kvfold.recipes.data import training_order
from tests.helpers import invoke, save_model, save_tokenizer, save_tokens, tiny_config
from tests.test_bad_input import change_config, refused
from tests.test_convert import IDS

HEADS = ("--to", "gqa", "--kv-heads", "8", "--method", "mean")
K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_model(tmp_path / "source", "llama")


def as_transformers_reads(folder: Path) -> Tensor:
    """Its logits, in the dtype that its config and its tensors give it."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(IDS).logits.float()


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


# What is read is what transformers reads


def untie(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)


def head_alone(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.pop(EMBEDDING))


def stale_index(folder: Path) -> None:
    save_file({name: t + 1 for name, t in load_file(folder / SINGLE).items()}, folder / "old.safetensors")
    names = dict.fromkeys(load_file(folder / SINGLE), "old.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def two_ropes(folder: Path) -> None:
    change_config(folder, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=1234.0)


def defaults_left_out(folder: Path) -> None:
    left_out = ("max_position_embeddings", "rms_norm_eps", "bos_token_id", "rope_parameters", "head_dim")
    change_config(folder, **dict.fromkeys(left_out, ...))


def half(folder: Path) -> None:
    change_config(folder, dtype="bfloat16")
    edit_tensors(folder, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))


UNLUCKY = (untie, head_alone, stale_index, two_ropes, defaults_left_out)


@pytest.mark.parametrize("damage", UNLUCKY)
@pytest.mark.parametrize(
    "flags", [HEADS, ("--to", "mfa-kr", "--width", "128"), ("--to", "mla", "--kv-budget", "100%")], ids=str
)
def test_nothing_changes_at_full_width(tmp_path: Path, source: Path, damage: Any, flags: tuple[str, ...]) -> None:
    damage(source)
    if "mla" in flags:  # the latent's norm and the rotary width of deepseek_v3 are not exact; its own layout is
        flags = ("--to", "mla", "--layout", "kvfold", "--kv-rank", "64", "--rope-dim", "64")
    tokens = save_tokens(tmp_path / "t.safetensors", 16, 40)
    code, text = invoke("convert", source, tmp_path / "out", *flags, "--calibrate", tokens, "--heal-steps", 0)
    assert code == 0, text
    wanted = as_transformers_reads(source)
    torch.testing.assert_close(as_transformers_reads(tmp_path / "out"), wanted, atol=2e-4, rtol=2e-4)


def test_a_windowed_qwen2_keeps_the_windows_of_its_upper_layers(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert invoke("convert", source, tmp_path / "out", *HEADS)[0] == 0
    torch.testing.assert_close(as_transformers_reads(tmp_path / "out"), as_transformers_reads(source), atol=0, rtol=0)
    tokens = save_tokens(tmp_path / "t.safetensors", 16, 40)
    flags = ("--to", "mfa-kr", "--width", 128, "--calibrate", tokens, "--heal-steps", 0)
    code, text = invoke("convert", source, tmp_path / "own", *flags)  # the layer without a window alone
    assert code == 0, text
    torch.testing.assert_close(as_transformers_reads(tmp_path / "own"), as_transformers_reads(source), atol=2e-4, rtol=2e-4)
    all_full = tiny_config("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2).to_dict()
    assert make_plan(all_full, ConvertSettings(to="mqa")).spec.sliding_window is None


def test_tensors_decide_the_dtype(tmp_path: Path, source: Path) -> None:
    half(source)
    tokens = save_tokens(tmp_path / "t.safetensors", 8, 40)
    flags = ("--to", "mla", "--kv-rank", 16, "--rope-dim", 8, "--calibrate", tokens, "--heal-steps", 0)
    assert invoke("convert", source, tmp_path / "out", *flags)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("kvfold", "float16")
    text = refused(tmp_path / "stock", "convert", source, tmp_path / "stock", *flags, "--layout", "deepseek_v3")
    assert "float16 cannot hold the scaled latents of deepseek_v3, --dtype bfloat16 can" in text


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    raw = (folder / SINGLE).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "overlapping tensors": (
        lambda f: edit_header(f, lambda h: h[K].update(data_offsets=h[V]["data_offsets"])),
        "is not a safetensors file, or damaged",
    ),
    "negative offsets": (
        lambda f: edit_header(f, lambda h: h[K].update(data_offsets=[-64, 16384 - 64])),
        "is not a safetensors file, or damaged",
    ),
    "weights of integers": (
        lambda f: edit_tensors(f, lambda t: t.update({K: t[K].int()})),
        "holds int32, and weights are floating-point",
    ),
    "norms of integers": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].long()})),
        "holds int64, and weights are floating-point",
    ),
    "norms on queries": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)})),
        "holds 'model.layers.1.self_attn.q_norm.weight', for which a llama model of 2 layers has no place",
    ),
    "a layer too many": (lambda f: change_config(f, num_hidden_layers=1), "for which a llama model of 1 layers has no place"),
    "a bias on the head": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.bias": torch.ones(128)})),
        "holds 'lm_head.bias'",
    ),
    "not causal": (lambda f: change_config(f, is_causal=False), "its attention is not causal (is_causal is false)"),
    "a part of each head": (lambda f: change_config(f, partial_rotary_factor=0.5), "turns a part of each head only"),
    "a reward model": (
        lambda f: change_config(f, architectures=["LlamaForSequenceClassification"]),
        "config.json names LlamaForSequenceClassification (architectures), and kvfold folds LlamaForCausalLM",
    ),
    "quantised by modelopt": (lambda f: (f / "hf_quant_config.json").write_text("{}"), "the source is quantised"),
    "compressed": (
        lambda f: change_config(f, compression_config={"format": "int-quantized"}),
        "is quantised (compression_config)",
    ),
    "too many layers": (lambda f: change_config(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "infinite eps": (lambda f: change_config(f, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "no base of a rope": (lambda f: change_config(f, rope_parameters={"rope_theta": "x"}), "rope_theta is 'x'"),
    "a factor of zero": (
        lambda f: change_config(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
        "rope_parameters",
    ),
    "nested JSON": (lambda f: (f / "config.json").write_text('{"a":' * 50000 + "1" + "}" * 50000), "is not valid JSON"),
    "a pipe": (lambda f: ((f / SINGLE).unlink(), os.mkfifo(f / SINGLE)), "is a pipe or a device"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON"),
    "an index out of the folder": (
        lambda f: ((f / SINGLE).rename(f.parent / "a.safetensors"), index(f, dict.fromkeys([K, V], "../a.safetensors"))),
        "names '../a.safetensors', which is no file of weights beside it",
    ),
    "an index of no file": (lambda f: ((f / SINGLE).unlink(), index(f, {K: None})), "index.json is damaged (weight_map"),
    "an adapter": (
        lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")),
        "is an adapter, not a checkpoint: merge it first",
    ),
}


def index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(tmp_path: Path, source: Path, case: str) -> None:
    damage, words = REFUSED[case]
    damage(source)
    assert words in refused(tmp_path / "out", "convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", 2)


def test_a_null_quantisation_is_none_and_an_adapter_beside_weights_stays_behind(tmp_path: Path, source: Path) -> None:
    change_config(source, quantization_config=None)
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"}))
    assert invoke("convert", source, tmp_path / "out", *HEADS)[0] == 0
    assert as_transformers_reads(tmp_path / "out").isfinite().all()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("method", ["align", "pca"])
def test_a_layer_that_was_pruned_to_zeros_is_folded(tmp_path: Path, source: Path, part: str, method: str) -> None:
    edit_tensors(source, lambda t: t[f"model.layers.0.self_attn.{part}_proj.weight"].zero_())
    assert invoke("convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", 2, "--method", method)[0] == 0
    written = load_file(tmp_path / "out" / SINGLE)
    assert all(tensor.isfinite().all() for tensor in written.values())
    assert not written[f"model.layers.0.self_attn.{part}_proj.weight"].any()
    assert written["model.layers.1.self_attn.k_proj.weight"].any()


@pytest.mark.parametrize("flags", [("--to", "gqa"), ("--to", "mla"), ("--to", "mla", "--layout", "kvfold")], ids=str)
def test_what_computes_something_else_than_was_folded_gets_no_name(
    tmp_path: Path, source: Path, flags: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout whose config means another RoPE than the one that was folded."""
    tokens, layouts = save_tokens(tmp_path / "t.safetensors", 4, 24), (source_layout, deepseek_v3, kvfold_layout)
    for layout in layouts:
        monkeypatch.setattr(layout, "config", lambda *a, right=layout.config: misled(right(*a)))
    command = ("convert", source, tmp_path / "out", *flags, "--kv-budget", "50%", "--calibrate", tokens, "--heal-steps", 0)
    code, text = invoke(*command)
    assert code == 1 and not (tmp_path / "out").exists()
    assert "of the written checkpoint computes something else than was folded (relative error" in text
    assert invoke(*command, "--overwrite", "--no-verify")[0] == 0


def misled(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}


def test_a_source_without_finite_results_is_refused(tmp_path: Path, source: Path) -> None:
    edit_tensors(source, lambda t: [tensor.fill_(1e38) for name, tensor in t.items() if "self_attn" in name])
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS)
    assert "layer 0 gives NaN or infinity on some tokens: check the source's weights there" in text


# No code of a stranger runs or travels


def hostile(source: Path) -> Path:
    """Give the source classes of its own, which leave `ran` behind; returns that."""
    save_tokenizer(source)
    ran = source.parent / "ran"
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change_config(source, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.T"]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return ran


@pytest.mark.parametrize("flags", [HEADS, ("--to", "mfa-kr", "--width", 16, "--heal-steps", 0)], ids=str)
def test_side_files_travel_by_a_list(tmp_path: Path, source: Path, flags: tuple[Any, ...]) -> None:
    ran = hostile(source)
    for name in ["LICENSE.txt", "Notice", "chat_template.jinja", "id_rsa", "run.sh", "x.pkl", "y.onnx", "params.json"]:
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("é")
    (tmp_path / "private").write_text("key")
    (source / "vocab.txt").symlink_to(tmp_path / "private")
    (source / "tokenizer.model").symlink_to(source / "LICENSE.txt")
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 24)
    code, text = invoke("convert", source, tmp_path / "out", *flags, "--calibrate", tokens)
    assert code == 0 and not ran.exists()
    assert (
        "left behind, not known to belong to a checkpoint: evil.py, id_rsa, params.json, run.sh, vocab.txt and 2 more" in text
    )
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    own = {"modeling_kvfold.py", "kvfold_attention.py"} if "mfa-kr" in flags else set()
    assert found == own | {
        *("config.json", "kvfold.json", SINGLE, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("LICENSE.txt", "Notice", "chat_template.jinja", "tokenizer.model", "additional_chat_templates/tool_use.jinja"),
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("auto_map", {}).get("AutoConfig") == ("modeling_kvfold.KvfoldConfig" if own else None)
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert load_tokenizer(tmp_path / "out")("é")["input_ids"] == load_tokenizer(source)("é")["input_ids"]
    (tmp_path / "out" / "notes.png").write_bytes(b"")
    (tmp_path / "out" / "key.png").symlink_to(tmp_path / "private")
    (tmp_path / "out" / "report.partial.json").touch()
    assert files_of(tmp_path / "out") == (sorted(found | {"notes.png"}), ["key.png", "report.partial.json"])


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, source: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(source, blobs)
    (blobs / "LICENSE").touch()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert invoke("convert", snapshot, tmp_path / "out", *HEADS)[0] == 0
    assert {"LICENSE", "generation_config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_nobody_is_asked_whether_to_run_code(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    ran, tokens = hostile(source), save_tokens(tmp_path / "t.safetensors", 4, 24)
    assert invoke("convert", source, tmp_path / "out", *HEADS)[0] == 0
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    with pytest.raises(UserError, match="loads by code of its own only .*: give tokens as file.safetensors:name"):
        load_tokenizer(source)
    change_config(source, model_type="evil")
    text = refused(tmp_path / "report", "evaluate", tmp_path / "out", "--against", source, "--on", tokens)
    assert "source loads by code of its own only (auto_map), and kvfold runs none: choose one that transformers has" in text
    assert not ran.exists()


def test_evaluate_opens_no_pickles(tmp_path: Path, source: Path) -> None:
    assert invoke("convert", source, tmp_path / "out", *HEADS)[0] == 0
    torch.save(load_file(source / SINGLE), source / "pytorch_model.bin")
    (source / SINGLE).unlink()
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 24)
    text = refused(tmp_path / "report", "evaluate", tmp_path / "out", "--against", source, "--on", tokens)
    assert "holds pickled .bin weights only, which kvfold does not open" in text


def test_the_source_writes_its_text_whatever_it_is_set_to_chat_like(source: Path) -> None:
    def text() -> Tensor:
        return sample_from_source(source, 12, 24, torch.device("cpu"), 0, 16, lambda line: None).ids

    change_config(source, bos_token_id=1)
    plain = text()
    assert plain.shape == (2, 12)
    chatting: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 5.0, "suppress_tokens": list(range(100))},
        {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "eos_token_id": 5},
    )
    for settings in chatting:
        (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, **settings}))
        assert torch.equal(text(), plain)
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 128}))
    with pytest.raises(UserError, match="bos_token_id, holds token id 128, outside the model's vocabulary of 128"):
        text()


# Names are shown as text


def test_names_are_plain_text() -> None:
    assert visible("a\nb\x1b[2J\u202e名\udcff") == "a\\nb\\x1b[2J\\u202e名\\udcff"
    assert markdown("a|b](x)<i>$`") == "a&#124;b&#93;(x)&lt;i&gt;&#36;&#96;"
    assert markdown("gqa-8_v2, 25 %") == "gqa-8_v2, 25 %"


def test_a_report_and_a_card_with_names_that_are_markup(tmp_path: Path, source: Path) -> None:
    home = tmp_path / "x$\\frac{ <b>|\n# h"
    home.mkdir()
    out, tokens = home / "o$\\frac{ <b>|\n# h<!-- kvfold:results -->", save_tokens(tmp_path / "t.safetensors", 4, 24)
    assert invoke("convert", source, out, "--to", "gqa", "--kv-heads", 2)[0] == 0
    code, text = invoke("evaluate", out, "--on", tokens, "--damage-only")
    assert code == 0, text
    report = (out / "report.md").read_text()
    assert len({line.count("|") for line in report.splitlines()[4:8] if line.startswith("|")}) == 1
    assert "<b>" not in report and "\n# h" not in report
    record = json.loads((out / "kvfold.json").read_text())
    record |= {"revision": "\n# owned <b>", "source": "javascript:alert(1)"}
    record["uptraining"] = [{"recipe": {"train": "x\n# owned", "data": "<b>"}, "tokens": 5}]
    (out / "kvfold.json").write_text(json.dumps(record))
    assert invoke("push", out, "me/x", "--dry-run", "--license", "mit")[0] == 0
    card = (out / "README.md").read_text()
    assert (
        not any(raw in card for raw in ("<b>", "\n# owned", "\n# h", "](javascript")) and card.count("<!-- kvfold:results") == 1
    )
    for flags in (("--license", "mit\ntags: [x]"), ("--license", "mit", "--base-model", "x/y\nz")):
        code, text = invoke("push", out, "me/x", "--dry-run", *flags)
        assert (code, text.count("\n")) == (2, 1)


# Numbers and files that would fill the memory, and what nobody foresaw


def test_what_would_fill_the_memory_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as YAML: it has an alias"):
        parse_yaml("a: &a [x, x]\nto: [*a, *a]", "here")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        parse_yaml("[" * 20000, "here")
    with pytest.raises(UserError, match="are the most: give fewer tokens"):
        training_order([0, 1], 10**9, 4, 0)
    save_tokenizer(source)
    (tmp_path / "t.jsonl").write_text('{"text":' + "[" * 100000 + "]" * 100000 + "}")
    text = refused(
        tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, "--calibrate", tmp_path / "t.jsonl", "--window", 16
    )
    assert "cannot be read as a text or dataset" in text
    with (source / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 6 << 30) + b"{")
        file.truncate((6 << 30) + 8)
    assert "or damaged (" in refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS)


def test_what_nobody_foresaw_is_one_line(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by zero\nindeed")

    monkeypatch.setattr("kvfold.convert.pipeline.open_source", broken)
    text = refused(tmp_path / "out", "convert", source, tmp_path / "out", *HEADS, code=1)
    assert "unforeseen ZeroDivisionError in test_trust.py, line " in text
    assert "by zero indeed; that is a fault of kvfold: please report" in text


def test_own_layout_registers_in_either_order_of_imports_and_is_saved_with_its_code(tmp_path: Path, source: Path) -> None:
    tokens = save_tokens(tmp_path / "t.safetensors", 4, 24)
    flags = ("--to", "mfa-kr", "--width", 16, "--calibrate", tokens, "--heal-steps", 0)
    assert invoke("convert", source, tmp_path / "out", *flags)[0] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_kvfold.py").exists() and (tmp_path / "again" / "kvfold_attention.py").exists()
    assert "auto_map" in json.loads((tmp_path / "again" / "config.json").read_text())
    code = f"import kvfold, transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})"
    ran = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
