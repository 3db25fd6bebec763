"""What vLLM says of a checkpoint: greedy tokens and log-probabilities for prompts of token ids, as JSON on the last line.

    python engine_vllm.py CHECKPOINT PROMPTS.json

Run by `make engines` in an environment of its own, with vLLM's CPU build; knows nothing of kvfold.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    checkpoint, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    llm = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=len(prompts["ids"]),
        disable_log_stats=True,
        # vLLM's own CPU rotary kernel is wrong for interleaved DeepSeek-V3 heads; its PyTorch path is right
        compilation_config={"custom_ops": ["none"]},
    )
    sampling = SamplingParams(temperature=0, max_tokens=prompts["new_tokens"], logprobs=0, detokenize=False, ignore_eos=True)
    found = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts["ids"]], sampling, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        steps = output.outputs[0].logprobs
        found.append({"tokens": tokens, "logprobs": [step[t].logprob for step, t in zip(steps, tokens, strict=True)]})
    print(json.dumps({"found": found}))
