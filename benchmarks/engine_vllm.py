"""What vLLM says of checkpoints: greedy tokens and log-probabilities for prompts of token ids, as a line of JSON for each.

    echo '["CHECKPOINT", "PROMPTS.json"]' | python engine_vllm.py

One process answers for all checkpoints that it is given, a line for each. Run by `make engines` in an environment of its own,
with vLLM's CPU build. kvfold is installed there for the checkpoints of its own layout; nothing here knows of it.

It continues the first prompt by `long` tokens too, where that is asked. With `mixed` prompts, of any lengths, it also says how
many of them are continued alike when they come all at once, in pieces of `CHUNK` tokens, and one by one; and how many tokens a
prompt that begins like another one did not compute again.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

CHUNK, BLOCK = 64, 32


def greedy(llm: LLM, prompts: list[list[int]], new_tokens: int) -> list[Any]:
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=0, detokenize=False, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def continuations(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def said_in(output: Any) -> dict[str, Any]:
    tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    return {"tokens": tokens, "logprobs": [step[t].logprob for step, t in zip(steps, tokens, strict=True)]}


def under_load(llm: LLM, prompts: list[list[int]], new_tokens: int) -> dict[str, int]:
    """All at once against one by one, each without what the other left in the prefix cache; and a shared beginning."""
    llm.reset_prefix_cache()
    together = continuations(greedy(llm, prompts, new_tokens))
    alone = []
    for prompt in prompts:
        llm.reset_prefix_cache()
        alone += continuations(greedy(llm, [prompt], new_tokens))
    longest = max(prompts, key=len)
    begun = longest[: len(longest) // 2 // BLOCK * BLOCK] + prompts[0][:BLOCK]
    llm.reset_prefix_cache()
    fresh = greedy(llm, [begun], new_tokens)
    llm.reset_prefix_cache()
    greedy(llm, [longest], 1)
    again = greedy(llm, [begun], new_tokens)
    return {
        "alike": sum(a == b for a, b in zip(together, alone, strict=True)),
        "requests": len(prompts),
        "reused": (again[0].num_cached_tokens or 0) if continuations(again) == continuations(fresh) else 0,
    }


def said_of(checkpoint: str, asked: dict[str, Any]) -> dict[str, Any]:
    latent = json.loads((Path(checkpoint) / "config.json").read_text())["model_type"] == "deepseek_v3"
    llm = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=max(256, len(asked["ids"][0]) + asked.get("long", 0)),
        max_num_seqs=64,
        max_num_batched_tokens=CHUNK,
        block_size=BLOCK,
        tensor_parallel_size=asked.get("ranks", 1),
        disable_log_stats=True,
        attention_backend="CPU_MLA" if latent else None,  # where the CPU has AMX, vLLM takes one for bfloat16 alone
        # vLLM's own CPU rotary kernel is wrong for interleaved DeepSeek-V3 heads; its PyTorch path is right
        compilation_config={"custom_ops": ["none"]},
    )
    greedy(llm, asked["ids"][:1], 2)  # what a process does once is not a row's
    began = time.perf_counter()
    found = [said_in(output) for output in greedy(llm, asked["ids"], asked["new_tokens"])]
    seconds, cache = time.perf_counter() - began, llm.llm_engine.vllm_config.cache_config
    said = {
        "found": found,
        "tokens_per_second": sum(len(one["tokens"]) for one in found) / seconds,
        "capacity": cache.num_gpu_blocks * cache.block_size,  # tokens in the memory given
    }
    if asked.get("long"):
        said["long"] = [said_in(output) for output in greedy(llm, asked["ids"][:1], asked["long"])]
    if asked.get("mixed"):
        said |= under_load(llm, asked["mixed"], asked["new_tokens"])
    return said


def main() -> None:
    for line in sys.stdin:
        checkpoint, prompts = json.loads(line)
        print(json.dumps(said_of(checkpoint, json.loads(Path(prompts).read_text()))), flush=True)
        gc.collect()  # before the next one takes memory


if __name__ == "__main__":
    main()
