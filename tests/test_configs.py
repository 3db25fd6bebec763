"""126 real config.json files, of which none is in this repository: what kvfold makes of each."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.convert.families import FAMILIES
from kvfold.convert.families.views import PART_OF, read_as
from kvfold.convert.planning.parameters import source_parameters
from kvfold.convert.planning.plan import make_plan
from kvfold.convert.planning.settings import ConvertSettings
from kvfold.errors import UserError
from tests.helpers import invoke

FOLDED = """
allam-7b-instruct aya-23-8b baichuan2-7b chatglm2-6b chatglm3-6b-32k codefuse-devops-7b-chat deepseek-moe-16b
dictalm2.0-instruct ernie-4.5-0.3b exaone-3.0-7.8b exaone-4.0-32b gemma-2-2b gemma-2-9b gemma-2b gemma-3-1b-it gemma-3-1b-ome
glm-4-9b-chat gpt-j-6b granite-3.3-8b hunyuan-mt-7b internlm-7b internlm2.5-7b internlm3-8b-instruct llama-2-13b-chat llama-2-7b
llama-3.1-405b llama-3.1-70b llama-3.1-8b llama-3.2-1b llama-3.2-3b mimo-7b-base minicpm-moe-8x2b minicpm4-8b mistral-7b-v0.1
mixtral-8x22b mixtral-8x7b nous-hermes-2-solar-10.7b olmo-2-32b olmo-3.1-32b-instruct orion-14b phi-1 phi-1.5 phi-2
phi-3-mini-128k phi-3.5-mini phi-3.5-moe phi-4 phi-4-mini-instruct qwen-7b-chat qwen1.5-0.5b-chat qwen1.5-4b-chat
qwen1.5-7b-chat qwen1.5-moe-a2.7b qwen2-1.5b-instruct qwen2-72b-instruct qwen2.5-0.5b qwen2.5-1.5b qwen2.5-14b qwen2.5-32b
qwen2.5-3b qwen2.5-72b qwen2.5-7b-instruct qwen3-0.6b qwen3-1.7b qwen3-30b-a3b qwen3-32b qwen3-8b smollm-1.7b smollm-360m
smollm2-1.7b-instruct smollm2-135m smollm2-360m stablelm-3b-4e1t starcoder2-7b vicuna-13b-v0 xverse-7b yi-34b yi-6b-chat
"""
LATENT = "redpajama-3b-v1"
"""Those whose class has no fewer key heads than query heads."""
WHOLE = "gemma-3-27b-it llava-1.5-7b-hf qwen2-audio-7b qwen2.5-vl-7b qwen3-vl-8b"
"""Models of several parts that GQA leaves whole."""
PART = "deepseek-vl2-tiny internvl2-2b janus-1.3b llava-v1.5-7b molmo-7b-d phi-3-vision"
"""Those of which the language model alone can be folded."""
REFUSED = dict(
    line.split(": ", 1)
    for line in """
bloom-3b: ALiBi's
deepseek-v2-lite: MLA already
deepseek-v3: MLA already
deepseek-v4-flash: one key for many tokens already
devstral-small-2-24b-fp8: queries are scaled by their position
falcon-40b: 'falcon' is not a family
gemma-4-26b-a4b: different geometry
gemma-4-e2b: share their keys and values
glm-5.2-fp8: MLA already
gpt-bigcode-santacoder-1.1b: learned ones
gpt-oss-20b: quantised (mxfp4)
gpt2: learned ones
gpt2-medium: learned ones
gte-qwen2-7b: not causal
kimi-k2: MLA already
llama-3.1-405b-fbgemm-fp8: quantised (fbgemm_fp8): fold the unquantised checkpoint, meta-llama/Meta-Llama-3.1-405B-Instruct
llama-3.2-11b-vision: attend to an image
llama-4-scout: attend in chunks
llama-4-scout-fp8-dynamic: quantised too (compressed-tensors)
mimo-v2-flash: different geometry
minicpm3-4b: MLA already
minimax-m2.5: quantised too (fp8)
mpt-7b: ALiBi's
nemotron-h-56b: state-space ones
nemotron-super-49b: different geometry
opt-125m: learned ones
phi-3-small: leaves out most keys
qwen2-vl-2b: quantised (awq)
qwen3-32b-fp8: quantised (fp8)
qwen3-8b-fp8: quantised (fp8)
qwen3-next-80b-a3b: linear attention
qwen3.5-27b: linear attention
qwen3.5-35b-a3b: linear attention
skywork-reward-llama-8b: fold the language model that it was made from
step-3.7-flash: 'step3p7' is not a family
vila1.5-3b: a folder of its own
""".strip().splitlines()
)
"""Name → what the refusal says, among other things."""
PUBLISHED = {
    "baichuan2-7b": 7_505_973_248,
    "codefuse-devops-7b-chat": 7_721_324_544,
    "deepseek-moe-16b": 16_375_728_128 + 27 * 2048,  # with the gates that Qwen2-MoE has before its shared experts
    "exaone-3.0-7.8b": 7_818_448_896,
    "internlm2.5-7b": 7_737_708_544,
    "minicpm4-8b": 8_185_253_888,
    "orion-14b": 14_498_703_360,
    "llava-1.5-7b-hf": 6_738_415_616 + 2 * 64 * 4096,  # Vicuna with 64 more tokens
    "qwen2.5-vl-7b": 7_615_616_512,  # Qwen2.5-7B
    "qwen3-vl-8b": 8_190_735_360,  # Qwen3-8B
    "glm-4-9b-chat": 9_399_951_360,
    "chatglm2-6b": 6_243_584_000,
    "phi-2": 2_779_683_840,
    "gpt-j-6b": 6_050_882_784 + 28 * 4 * 4096,  # with the biases of zero that Phi has on attention
    "janus-1.3b": 1_652_656_128,
    "phi-3-vision": 3_821_079_552,  # Phi-3-mini
}
"""Parameters of the language model, tied ones once."""


@pytest.fixture(scope="module")
def configs(shared: Path) -> dict[str, dict[str, Any]]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted((shared / "configs").glob("*.json"))}
    if not found:
        pytest.skip(f"no configs under {shared}: set KVFOLD_SHARED to run this")
    return found


def refusal(config: dict[str, Any], to: str = "mqa", **settings: Any) -> str:
    """What `plan` refuses with, empty where it does not."""
    try:
        make_plan(config, ConvertSettings(to=to, **settings)).refuse()
    except UserError as error:
        return str(error)
    return ""


def test_every_config_is_folded_or_refused_with_its_reason(configs: dict[str, dict[str, Any]]) -> None:
    folded, parts, latent = [*FOLDED.split(), *WHOLE.split()], PART.split(), LATENT.split()
    assert sorted([*folded, *parts, *latent, *REFUSED]) == sorted(configs)
    assert len(folded) + len(parts) + len(latent) == 90
    said = {name: refusal(config) for name, config in configs.items()}
    assert sorted(name for name, text in said.items() if not text) == sorted(folded)
    assert {name: said[name] for name, words in REFUSED.items() if words not in said[name]} == {}
    for name in parts:
        assert "--part language writes its language model alone" in said[name]
        assert refusal(configs[name], part="language") == ""
    for name in latent:
        assert "as many key heads as query heads" in said[name]
        assert refusal(configs[name], "mla", kv_budget="50%") == ""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(configs: dict[str, dict[str, Any]], name: str) -> None:
    config = read_as(configs[name])
    assert source_parameters(config, make_plan(config, ConvertSettings(to="source")).spec) == PUBLISHED[name]


def test_wrapped_language_models_have_their_own_geometry(configs: dict[str, dict[str, Any]]) -> None:
    """What a config leaves out is what transformers' class takes: all of LLaVA's Llama but its vocabulary."""
    for name, wanted in {
        "llava-1.5-7b-hf": (32, 32, 128),
        "qwen2-audio-7b": (32, 32, 128),
        "qwen3-vl-8b": (36, 8, 128),
    }.items():
        spec = make_plan(configs[name], ConvertSettings(to="mqa")).spec
        assert (spec.layers, spec.kv_heads, spec.head_dim) == wanted
        assert PART_OF in read_as(configs[name])


def test_families_lists_what_is_known() -> None:
    code, said = invoke("families", "--json", "-")
    assert code == 0, said
    found = json.loads(said)
    families = {each["model_type"]: each for each in found["families"]}
    assert families.keys() == FAMILIES.keys()
    assert families["llama"]["targets"] == {
        **dict.fromkeys(("gqa", "mqa", "source"), "source"),
        **{"mla": "deepseek_v3", "mfa": "kvfold", "mfa-kr": "kvfold"},
    }
    assert families["qwen3"]["targets"]["mla"] == "kvfold"
    assert "mla" in families["gpt_neox"]["targets"]
    assert "mqa" not in families["gpt_neox"]["targets"]
    assert all("mla" in each["targets"] for each in families.values())
    assert {"model_type": "internlm2", "architecture": "InternLM2ForCausalLM", "read_as": "llama"} in found["translations"]
    assert {"model_type": "llava", "whole": ["gqa", "mqa", "source"]} in found["parts"]
    assert {"model_type": "molmo", "whole": []} in found["parts"]
    code, said = invoke("families")
    assert code == 0, said
    assert "Qwen3MoeForCausalLM" in said
    assert "internlm2 as llama" in said
