"""What llama.cpp says of a GGUF file, as JSON on the last line: greedy tokens and log-probabilities, and tokens of texts.

    python engine_llama_cpp.py FILE.gguf PROMPTS.json

Run by `make engines` in an environment of its own, with llama-cpp-python; knows nothing of kvfold.
"""

import json
import sys
from pathlib import Path

import numpy
from llama_cpp import Llama

FLOAT32 = 0  # ggml's number for it

if __name__ == "__main__":
    file, prompts = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    llm = Llama(file, n_ctx=256, n_threads=1, logits_all=True, type_k=FLOAT32, type_v=FLOAT32, verbose=False)
    found = []
    for ids in prompts["ids"]:
        llm.reset()
        llm.eval(ids)
        tokens, logprobs = [], []
        for _ in range(prompts["new_tokens"]):
            logits = llm.scores[llm.n_tokens - 1].astype(numpy.float64)
            token = int(logits.argmax())
            tokens.append(token)
            logprobs.append(float(logits[token] - logits.max() - numpy.log(numpy.exp(logits - logits.max()).sum())))
            llm.eval([token])
        found.append({"tokens": tokens, "logprobs": logprobs})
    texts = [llm.tokenize(text.encode(), add_bos=True, special=False) for text in prompts["texts"]]
    print(json.dumps({"found": found, "texts": texts}))
