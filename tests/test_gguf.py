"""GGUF files: what llama.cpp reads in them, their tokenizers, and what is refused. `make engines` runs them in llama.cpp."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, TokenType
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from kvfold.convert.publishing.gguf import UNREACHABLE, read_vocabulary, write_gguf
from kvfold.errors import UserError
from kvfold.recipes.demo.demo import MODEL
from tests.helpers import invoke, save_model, save_tokens
from tests.test_bad_input import refused
from tests.test_convert import fold


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MLA checkpoint with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("gguf")
    source = save_model(folder / "source", "llama", vocab_size=2050, tie_word_embeddings=True, rms_norm_eps=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, source / name)
    tokens = save_tokens(folder / "t.safetensors", 8, 40)
    fold(source, folder / "mla", to="mla", kv_rank=12, rope_dim=4, calibrate=tokens, dtype="bf16")
    return folder / "mla"


def numbers(tensor: Any) -> Tensor:
    """A tensor of a GGUFReader."""
    shape = tuple(reversed(tensor.shape.tolist()))
    if tensor.tensor_type.name == "BF16":
        return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).view(shape)
    return torch.from_numpy(tensor.data.copy()).view(shape)


def test_every_number_of_the_checkpoint_is_there(folded: Path, tmp_path: Path) -> None:
    """Against llama.cpp's graph of deepseek2: queries times attn_k_b, the attention's output times attn_v_b."""
    code, text = invoke("gguf", folded, tmp_path / "m.gguf")
    assert code == 0 and "m.gguf" in text
    reader = GGUFReader(tmp_path / "m.gguf")
    ours = {tensor.name: numbers(tensor) for tensor in reader.tensors}
    stored, config = load_file(folded / "model.safetensors"), json.loads((folded / "config.json").read_text())
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in stored.values())
    heads, nope, value, rank = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"], 12
    for layer in range(config["num_hidden_layers"]):
        up = stored[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].view(heads, nope + value, rank)
        q, latent = torch.randn(heads, nope), torch.randn(rank)
        # mul_mat contracts what numpy has last
        scores = torch.einsum("hrn,hn,r->h", ours[f"blk.{layer}.attn_k_b.weight"].float(), q, latent)
        torch.testing.assert_close(scores, torch.einsum("hnr,hn,r->h", up[:, :nope].float(), q, latent))
        assert torch.equal(ours[f"blk.{layer}.attn_v_b.weight"], up[:, nope:])
        assert torch.equal(ours[f"blk.{layer}.attn_q.weight"], stored[f"model.layers.{layer}.self_attn.q_proj.weight"])
        assert ours[f"blk.{layer}.attn_kv_a_norm.weight"].dtype == torch.float32
    assert torch.equal(ours["output.weight"], stored["lm_head.weight"])
    assert ours["token_embd.weight"].dtype == torch.bfloat16
    facts = {name.removeprefix("deepseek2."): field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "deepseek2"
    assert (facts["attention.key_length"], facts["attention.value_length"], facts["attention.head_count_kv"]) == (16, 12, 1)
    assert (facts["attention.key_length_mla"], facts["attention.value_length_mla"]) == (nope + 4, value)
    assert (facts["attention.q_lora_rank"], facts["attention.kv_lora_rank"], facts["rope.dimension_count"]) == (0, 12, 4)
    assert facts["rope.freq_base"] == pytest.approx(config["rope_parameters"]["rope_theta"])
    assert facts["leading_dense_block_count"] == facts["block_count"] == config["num_hidden_layers"]
    assert facts["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert facts["tokenizer.ggml.model"] == "gpt2" and facts["tokenizer.ggml.pre"] == "gpt-2"
    tokenizer = AutoTokenizer.from_pretrained(folded)
    assert facts["tokenizer.ggml.tokens"] == [*tokenizer.convert_ids_to_tokens(range(2048)), "[PAD2048]", "[PAD2049]"]
    assert facts["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert len(facts["tokenizer.ggml.merges"]) == len(json.loads((folded / "tokenizer.json").read_text())["model"]["merges"])


def test_the_best_merge_has_the_best_score(tmp_path: Path) -> None:
    """Joining by score, as llama.cpp does, gives the tokens of a byte-fallback tokenizer."""
    merges = ["a b", "▁ ab", "ab c", ["c", "d"], "▁ab cd"]
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "▁": 7}
    vocab |= {"ab": 8, "▁ab": 9, "abc": 10, "cd": 11, "▁abcd": 12}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": merges}
    added = [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "normalizer": normalizer, "added_tokens": added}))
    found = read_vocabulary(tmp_path, 14, None)
    assert (found["model"], found["space_prefix"]) == ("llama", True)
    assert found["tokens"][8:] == ["ab", "▁ab", "abc", "cd", "▁abcd", "[PAD13]"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, TokenType.NORMAL, TokenType.UNUSED]
    assert [found["types"][i] for i in (0, 1, 2, 3, 13)] == kinds
    assert found["scores"] == [UNREACHABLE] * 8 + [0.0, -1.0, -2.0, -3.0, -4.0, UNREACHABLE]
    pieces = list("▁abcd")
    score = dict(zip(found["tokens"], found["scores"], strict=True))
    while len(pieces) > 1:
        best, at = max((score.get(a + b, -1e30), -i) for i, (a, b) in enumerate(pairwise(pieces)))
        if best <= UNREACHABLE:
            break
        pieces[-at : 2 - at] = ["".join(pieces[-at : 2 - at])]
    assert pieces == ["▁abcd"]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "smollm"),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "qwen2",
        ),
        ("[a-z]+", None),
        ({"type": "ByteLevel", "use_regex": False}, None),
    ],
)
def test_pre_tokenizers(steps: Any, name: str | None, tmp_path: Path) -> None:
    if isinstance(steps, str):
        split = {"type": "Split", "pattern": {"Regex": steps}}
        steps = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel"}]}
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    if name is None:
        with pytest.raises(UserError, match="give --pre"):
            read_vocabulary(tmp_path, 1, None)
    assert read_vocabulary(tmp_path, 1, "mine" if name is None else None)["pre"] == (name or "mine")


def test_refusals_leave_nothing(folded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folded.parent / "source"

    def said(folder: Path) -> str:
        return refused(tmp_path / "m.gguf", "gguf", folder, tmp_path / "m.gguf")

    assert "is a llama checkpoint: llama.cpp's own convert_hf_to_gguf.py" in said(source)
    bare = Path(shutil.copytree(folded, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in said(bare)
    shutil.copyfile(folded / "tokenizer.json", bare / "tokenizer.json")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "model_type": "kvfold"}))
    assert "fold with --layout deepseek_v3" in said(bare)
    (bare / "config.json").write_text(json.dumps({**config, "q_lora_rank": 64}))
    assert "was not folded by kvfold" in said(bare)
    (tmp_path / "there.gguf").write_text("kept")
    text = refused(tmp_path / "m.gguf", "gguf", folded, tmp_path / "there.gguf")
    assert "exists: choose another name, or pass --overwrite" in text
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_gguf(folded, tmp_path / "there.gguf", overwrite=True)
    assert (tmp_path / "there.gguf").read_text() == "kept" and not (tmp_path / ".there.gguf.kvfold").exists()


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        (
            "tokenizer.json",
            lambda t: t["model"]["vocab"].update(zzz=-1),
            "gives 'zzz' the id -1, outside the model's vocabulary",
        ),
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(zzz=10**6), "gives 'zzz' the id 1000000, outside"),
        ("tokenizer.json", lambda t: t["added_tokens"].append({"id": 2050, "content": "x"}), "gives 'x' the id 2050, outside"),
        ("tokenizer.json", lambda t: t["added_tokens"].append({"content": "x"}), "is damaged (added_tokens"),
        ("tokenizer.json", lambda t: t["model"].update(merges=[5]), "is damaged (model.merges"),
        ("tokenizer.json", lambda t: t.pop("model"), "is damaged (model: field required)"),
        ("config.json", lambda c: c.update(vocab_size=10**9), "vocab_size"),
        ("config.json", lambda c: c.update(num_hidden_layers=10**9, first_k_dense_replace=10**9), "num_hidden_layers"),
        ("config.json", lambda c: c.pop("rms_norm_eps"), "is damaged (rms_norm_eps: field required)"),
        ("config.json", lambda c: c.update(qk_nope_head_dim=4), "has shape"),
    ],
)
def test_damaged_inputs(folded: Path, tmp_path: Path, file: str, edit: Any, words: str) -> None:
    copy = shutil.copytree(folded, tmp_path / "copy")
    content = json.loads((copy / file).read_text())
    edit(content)
    (copy / file).write_text(json.dumps(content))
    assert words in refused(tmp_path / "m.gguf", "gguf", copy, tmp_path / "m.gguf")


def test_a_tokenizer_that_does_not_state_its_model_is_read_as_what_it_is(folded: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folded, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    del content["model"]["type"]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(copy, 2050, None) == read_vocabulary(folded, 2050, None)
