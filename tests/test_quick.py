"""Plans without torch: the same as with it, and refused where they would not be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from kvfold.convert.families.views import read_as
from kvfold.convert.planning import quick
from kvfold.convert.planning.parameters import GATED, source_parameters
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.quick import needs_no_torch
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.convert.source.model import build_on_meta
from kvfold.errors import UserError
from tests.helpers import tiny_config
from tests.test_plan import LLAMA_2_7B, LLAMA_31_8B, MISTRAL, QWEN, SMOLLM, TINYLLAMA

PUBLISHED = [LLAMA_2_7B, LLAMA_31_8B, TINYLLAMA, SMOLLM, MISTRAL, QWEN]
BIASED = {name: {biases: True} for name, (_, biases) in GATED.items() if biases}
FEW_HEADS: dict[str, Any] = {"num_key_value_heads": 2}
FEW_SPARSE = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
TINY = [tiny_config(name, **more).to_dict() for name in GATED for more in ({}, BIASED.get(name, FEW_HEADS))]
TINY.append(tiny_config("qwen3_moe", **FEW_SPARSE).to_dict())
LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}
REFUSED: list[dict[str, Any]] = [
    {**SMOLLM, "num_key_value_heads": 2},
    {**SMOLLM, "head_dim": 7},
    {**SMOLLM, "hidden_size": "wide"},
    {**SMOLLM, "rope_theta": -1.0},
    {**SMOLLM, "pad_token_id": 49152},
    {**SMOLLM, "model_type": "lama"},
    {**SMOLLM, "model_type": "mamba"},
    {**SMOLLM, "use_cache": "perhaps"},
    {**SMOLLM, "quantization_config": {"bits": 4}},
    {**SMOLLM, "architectures": ["LlamaForSequenceClassification"]},
    {**SMOLLM, "sliding_window": "far"},
    {**QWEN, "head_dim": None},
    {"model_type": "llama"},
    {**tiny_config("qwen3_moe").to_dict(), "decoder_sparse_step": 0},
]
FLAT = [config for config in TINY if "full_attention" not in config["rope_parameters"]]
"""Where transformers writes a RoPE for every kind of layer, the config is read with torch."""
CONFIGS = [*PUBLISHED, *FLAT, {**SMOLLM, **LINEAR}, *REFUSED]


def planned(config: dict[str, Any]) -> Any:
    """What a plan says, or why there is none."""
    try:
        plan = make_plan(config, ConvertSettings(to="mla", kv_budget="25%"))
        return json.loads(json.dumps(plan.record(1, "bfloat16", source_parameters(config, plan.spec))))
    except UserError as error:
        return str(error)


def planned_without_torch(configs: list[dict[str, Any]]) -> list[Any]:
    """The same, in a process that hides torch from transformers."""
    code = (
        "import json, sys\n"
        "from kvfold.convert.planning.parameters import source_parameters\n"
        "from kvfold.convert.planning.plan import make_plan\n"
        "from kvfold.convert.planning.quick import hide_torch\n"
        "from kvfold.convert.planning.settings import ConvertSettings\n"
        "from kvfold.errors import UserError\n"
        "said = []\n"
        "for config in json.load(sys.stdin):\n"
        "    hide_torch(config)\n"
        "    try:\n"
        "        plan = make_plan(config, ConvertSettings(to='mla', kv_budget='25%'))\n"
        "        said.append(plan.record(1, 'bfloat16', source_parameters(config, plan.spec)))\n"
        "    except UserError as error:\n"
        "        said.append(str(error))\n"
        "assert sys.modules['torch'] is None\n"
        "print(json.dumps(said))\n"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, input=json.dumps(configs), capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    said: list[Any] = json.loads(ran.stdout)
    return said


def test_a_plan_is_the_same_without_torch() -> None:
    assert all(map(needs_no_torch, CONFIGS))
    for config, said in zip(CONFIGS, planned_without_torch(CONFIGS), strict=True):
        assert said == planned(config), config
        assert isinstance(said, str) == (config in REFUSED), config


def test_a_plan_of_a_real_config_is_the_same_without_torch(shared: Path) -> None:
    raw = [json.loads(path.read_text()) for path in sorted((shared / "configs").glob("*.json"))]
    if not raw:
        pytest.skip(f"no configs under {shared}: set KVFOLD_SHARED to run this")
    configs = [config for config in map(read_as, raw) if needs_no_torch(config)]
    assert len(configs) == 103
    assert len([config for config in configs if config.get("model_type") in GATED]) == 74
    for config, said in zip(configs, planned_without_torch(configs), strict=True):
        assert said == planned(config), config


def test_transformers_is_imported_as_always_where_its_config_classes_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages without what their __init__ does, which another version may want."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("torch", "transformers")}
    monkeypatch.setattr(quick, "import_module", Mock(side_effect=ImportError("cannot import name")))
    try:
        for name in ours:
            del sys.modules[name]
        quick.hide_torch(SMOLLM)
        assert sys.modules.pop("torch") is None
        assert not [name for name in sys.modules if name.partition(".")[0] == "transformers"]
    finally:
        sys.modules.update(ours)


def test_a_plan_is_quick(tmp_path: Path) -> None:
    """In seconds of CPU, which a busy machine does not change much; with torch it would be four."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B))
    command = [sys.executable, "-X", "importtime", "-m", "kvfold", "plan", str(tmp_path), "--to", "gqa", "--kv-heads", "3"]
    before = os.times()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    assert "8 key heads divide into 1, 2, 4, 8" in ran.stderr and "8,030,261,248" in ran.stdout
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "transformers.utils" in imported and not {"torch", "transformers"} & imported
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5


@pytest.mark.parametrize("config", [*PUBLISHED, *TINY])
def test_parameters_are_counted_without_the_model(config: dict[str, Any]) -> None:
    spec = make_plan(config, ConvertSettings(to="mqa")).spec
    assert source_parameters(config, spec) == build_on_meta(config).num_parameters()


@pytest.mark.parametrize(
    "unusual",
    [
        {"model_type": "phimoe"},
        {"hidden_act": "swoosh"},
        {"hidden_act": 3},
        {"torch_dtype": "bfloat17"},
        {"experts_implementation": "grouped_mm"},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"rope_parameters": {**LLAMA_31_8B["rope_scaling"], "high_freq_factor": 1.0}},
    ],
)
def test_what_torch_has_to_check_is_checked_with_it(unusual: dict[str, Any]) -> None:
    assert not needs_no_torch({**SMOLLM, **unusual})
