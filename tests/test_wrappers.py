"""Models of several parts: the language model is folded where it is, or taken out; the rest is not touched."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from kvfold.convert import pipeline
from kvfold.convert.families import wrappers
from kvfold.errors import ConversionError
from tests.helpers import invoke, save_tokens

IDS = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(1))
TEXT = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "vocab_size": 128, "max_position_embeddings": 128, "head_dim": 8},
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
IDS_OF_IMAGES = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
MIXED = {
    **{"num_hidden_layers": 3, "sliding_window": 12, "pad_token_id": 0},
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
LLAVA: dict[str, Any] = {
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": {**CLIP, "model_type": "clip_vision_model"},
    "image_token_index": 120,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": LLAVA,
    "smolvlm": {
        "text_config": {**TEXT, "model_type": "llama", "pad_token_id": 0},
        "vision_config": {**CLIP, "model_type": "smolvlm_vision"},
        **{"image_token_id": 120, "pad_token_id": 0, "scale_factor": 1},
    },
    "gemma3": {
        "text_config": {**TEXT, **MIXED, "query_pre_attn_scalar": 24},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        **{"mm_tokens_per_image": 4, "image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122},
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**CLIP, "head_dim": 16, "model_type": "pixtral"},
        "image_token_index": 120,
    },
    "qwen2_5_vl": {"text_config": {**TEXT, **MROPE}, "vision_config": {**QWEN, "fullatt_block_indexes": [0]}, **IDS_OF_IMAGES},
    "qwen3_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **IDS_OF_IMAGES,
    },
    "llava_next": LLAVA,
    "llava_next_video": {**LLAVA, "video_token_index": 121},
    "llava_onevision": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        **{"image_token_index": 120, "video_token_index": 121},
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama", "pad_token_id": 0},
        "vision_config": {**CLIP, "model_type": "idefics3_vision"},
        **{"image_token_id": 120, "pad_token_id": 0, "scale_factor": 1},
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**CLIP, "image_size": [28, 28], "patch_size": [14, 14], "model_type": "internvl_vision"},
        "image_token_id": 120,
    },
    "aya_vision": {
        # another scale of the logits is none of transformers' whole model, which leaves it out
        "text_config": {**TEXT, **MIXED, "model_type": "cohere2", "logit_scale": 1.0},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        "image_token_index": 120,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **IDS_OF_IMAGES,
    },
    "qwen2_audio": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "audio_config": {
            **{"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 8},
            **{"max_source_positions": 16, "model_type": "qwen2_audio_encoder"},
        },
        "audio_token_index": 120,
    },
}
"""Every model that can stay whole, shrunk: its language model, and what lies beside it."""


TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "cohere2")


def save_wrapper(folder: Path, kind: str, max_shard_size: str = "5GB", **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**WRAPPERS[kind], "tie_word_embeddings": False, **changes})
    model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "self_attn" in name:
                parameter.uniform_(0.3, 3.0) if "_norm" in name else parameter.normal_(std=0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def logits(folder: Path, whole: bool) -> Tensor:
    kind: Any = AutoModelForMultimodalLM if whole else AutoModelForCausalLM
    with torch.no_grad():
        return kind.from_pretrained(folder, dtype=torch.float32)(input_ids=IDS).logits


def run(*args: Any) -> None:
    code, said = invoke(*args)
    assert code == 0, said


def test_every_model_that_can_stay_whole_is_listed_here() -> None:
    assert WRAPPERS.keys() == {wrapper.model_type for wrapper in wrappers.WRAPPERS.values() if wrapper.stays}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_language_model_is_folded_where_it_is(tmp_path: Path, kind: str) -> None:
    source = save_wrapper(tmp_path / "source", kind)
    run("convert", source, tmp_path / "alone", "--to", "source", "--part", "language")
    assert json.loads((tmp_path / "alone/config.json").read_text())["model_type"] in TEXT_MODELS
    torch.testing.assert_close(logits(tmp_path / "alone", whole=False), logits(source, whole=True))
    for out, part in (("whole", ()), ("part", ("--part", "language"))):
        run("convert", source, tmp_path / out, "--to", "gqa", "--kv-heads", "2", *part)
    folded = logits(tmp_path / "whole", whole=True)
    torch.testing.assert_close(folded, logits(tmp_path / "part", whole=False))
    assert not torch.allclose(folded, logits(source, whole=True), atol=1e-3)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "whole/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name and "visi" not in name and "audio" not in name for name in changed)
    assert json.loads((tmp_path / "whole/config.json").read_text())["text_config"]["num_key_value_heads"] == 2


def test_what_is_folded_where_it_is_can_be_healed_measured_and_trained_on(tmp_path: Path) -> None:
    """On its text; the whole model comes out of it each time."""
    sharp = {"text_config": {**WRAPPERS["qwen2_5_vl"]["text_config"], "initializer_range": 0.2}}
    source = save_wrapper(tmp_path / "source", "qwen2_5_vl", **sharp)
    text = save_tokens(tmp_path / "text.safetensors", 16, 32, vocab=100)
    how = ("--calibrate", text, "--heal-steps", "2", "--heal-batch-tokens", "64")
    run("convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", "2", *how)
    run("evaluate", tmp_path / "out", "--on", text, "--damage-only")
    measured = json.loads((tmp_path / "out/report.json").read_text())
    assert measured["models"][0]["cache_numbers_per_token_per_layer"] == 32
    run("push", tmp_path / "out", "user/x", "--dry-run", "--base-model", "user/y", "--license", "mit")
    card = (tmp_path / "out/README.md").read_text()
    assert "model = Qwen2_5_VLForConditionalGeneration.from_pretrained" in card
    assert "what becomes of images, video or sound is not known" in card
    recipe = ("tokens=1024", "batch=4", "eval_tokens=128", "learning_rate=0.003", "ce_weight=0", "bf16=false")
    run("uptrain", tmp_path / "out", tmp_path / "healed", "--recipe", "distill-attention", "--data", text, *recipe)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "healed/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "visual" in name)
    healed, folded = (logits(tmp_path / name, whole=True) for name in ("healed", "out"))
    wanted = logits(source, whole=True)
    assert (healed - wanted).square().mean() < (folded - wanted).square().mean()
    lora = ("--recipe", "distill-lora", "--keep-adapter", "--data", text)
    code, said = invoke("uptrain", tmp_path / "out", tmp_path / "adapter", *lora)
    assert code == 2
    assert "--keep-adapter is not possible within qwen2_5_vl" in said


def test_a_resume_knows_the_whole_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_wrapper(tmp_path / "source", "llava", max_shard_size="30KB")
    how = (source, tmp_path / "out", "--to", "mqa")
    run("convert", source, tmp_path / "once", "--to", "mqa")

    def fail(*_: Any) -> None:
        raise ConversionError("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "verify", fail)
        assert invoke("convert", *how)[0] == 1
    places = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    language = {file for name, file in places.items() if "language_model" in name or "lm_head" in name}
    tower = next(file for file in places.values() if file not in language)
    before = (source / tower).stat()
    os.utime(source / tower, (0, 0))
    code, said = invoke("convert", *how, "--resume")
    assert code == 2
    assert tower in said
    os.utime(source / tower, ns=(before.st_atime_ns, before.st_mtime_ns))
    run("convert", *how, "--resume")
    once, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "out"))
    assert once.keys() == resumed.keys() == places.keys()
    assert all(torch.equal(once[name], resumed[name]) for name in once)


def test_other_targets_want_the_language_model_alone(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "source", "llava")
    code, said = invoke("plan", source, "--to", "mla", "--kv-budget", "50%")
    assert code == 2
    assert "use --to gqa, or --part language writes its language model alone" in said
    text = save_tokens(tmp_path / "text.safetensors", 4, 32, vocab=100)
    how = ("--to", "mla", "--kv-budget", "50%", "--calibrate", text, "--heal-steps", "0", "--part", "language")
    run("convert", source, tmp_path / "out", *how)
    assert logits(tmp_path / "out", whole=False).isfinite().all()
    code, said = invoke("plan", tmp_path / "out", "--to", "mqa", "--part", "language")
    assert code == 2


def test_older_names_and_flat_configs_are_read_alike(tmp_path: Path) -> None:
    """Qwen2.5-VL was published with a flat config and its layers under `model.layers`."""
    source = save_wrapper(tmp_path / "source", "qwen2_5_vl")
    whole = logits(source, whole=True)
    config = json.loads((source / "config.json").read_text())
    inner = config.pop("text_config")
    flat = {**inner, **config, "model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    flat["rope_theta"] = flat.pop("rope_parameters")["rope_theta"]
    (source / "config.json").write_text(json.dumps(flat))
    run("convert", source, tmp_path / "alone", "--to", "source", "--part", "language")
    torch.testing.assert_close(logits(tmp_path / "alone", whole=False), whole)
    run("convert", source, tmp_path / "out", "--to", "gqa", "--kv-heads", "4")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_key_value_heads"] == 4
    torch.testing.assert_close(logits(tmp_path / "out", whole=True), whole, atol=1e-4, rtol=1e-4)


def test_classes_of_others_stay_behind(tmp_path: Path) -> None:
    source = save_wrapper(tmp_path / "source", "llava")
    config = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "someone/else--code.Config", "AutoModelForCausalLM": "someone/else--code.Model"}
    config |= {"auto_map": code, "text_config": {**config["text_config"], "auto_map": code}}
    (source / "config.json").write_text(json.dumps(config))
    run("convert", source, tmp_path / "out", "--to", "mqa")
    assert "auto_map" not in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize("nested", [[1], "x", None, {"model_type": "mistral3"}])
def test_a_part_that_is_no_language_model_is_refused(tmp_path: Path, nested: Any) -> None:
    config = {**TEXT, "model_type": "mistral3", "text_config": nested}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, said = invoke("plan", tmp_path, "--to", "mqa")
    assert code == 2
    assert "text_config is " in said and "which is no language model's config" in said


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_what_a_part_leaves_out_means_what_it_means_there(tmp_path: Path, kind: str) -> None:
    """Qwen2.5-VL's language model by itself would be read with another eps and another base of its RoPE."""
    source = save_wrapper(tmp_path / "source", kind)
    config = json.loads((source / "config.json").read_text())
    for key in ("rms_norm_eps", "model_type", "max_position_embeddings"):
        config["text_config"].pop(key, None)
    del config["text_config"]["rope_parameters"]["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    whole = logits(source, whole=True)
    run("convert", source, tmp_path / "out", "--to", "source", "--part", "language")
    torch.testing.assert_close(logits(tmp_path / "out", whole=False), whole)
