"""Train the demo model from nothing: a byte-level BPE tokenizer and a small multi-head-attention Llama.

    python -m kvfold.recipes.demo.train OUT [--steps 3500] [--resume]

Data: the standard library's source without the held-out modules (corpus.py). About an hour on two CPU cores with the
defaults. A checkpoint of the run is kept in OUT/run.pt, and --resume goes on from it. OUT is a plain Hugging Face
checkpoint in bf16; `training.json` beside it records the settings and the held-out bits per byte.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfold.recipes.demo.corpus import HELDOUT, standard_library

END = "<|endoftext|>"
WINDOW, BATCH = 512, 8
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=WINDOW,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=WINDOW)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one row of ids, each headed by the end-of-text token, which the tokenizer puts there."""
    return torch.tensor([i for ids in tokenizer(texts, verbose=False)["input_ids"] for i in ids])


@torch.no_grad()
def heldout_bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    texts = standard_library(HELDOUT)
    ids = pack(tokenizer, texts)
    rows = ids[: len(ids) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    nats = sum(
        torch.nn.functional.cross_entropy(
            model(row[:, :-1]).logits.float().flatten(0, 1), row[:, 1:].flatten(), reduction="sum"
        ).item()
        for row in rows.split(8)
    )
    bytes_per_token = sum(len(t.encode()) for t in texts) / len(ids)
    return nats / (rows.shape[0] * WINDOW) / math.log(2) / bytes_per_token


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    texts = standard_library(exclude=HELDOUT)
    tokenizer = train_tokenizer(texts, CONFIG.vocab_size)
    tokenizer.save_pretrained(args.out)
    ids = pack(tokenizer, texts)
    print(f"{len(ids):,} training tokens from {len(texts)} files, {sum(map(len, texts)) / len(ids):.2f} characters each")

    model = LlamaForCausalLM(CONFIG)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], args.lr, (0.9, 0.95)
    )
    first = 0
    if args.resume:
        state = torch.load(args.out / "run.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    start, running = time.time(), math.nan
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        # Windows at random offsets, drawn from the step alone so that a resumed run sees the same data.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        offsets = torch.randint(len(ids) - WINDOW - 1, (BATCH,), generator=generator)
        rows = torch.stack([ids[o : o + WINDOW + 1] for o in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0 or step == args.steps - 1:
            speed = (step + 1 - first) * BATCH * WINDOW / (time.time() - start)
            print(f"step {step:5d}  loss {running:.4f}  {speed:,.0f} tokens/s", flush=True)
        if step % 100 == 99:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, args.out / "run.pt")

    model = model.eval().to(torch.bfloat16)
    model.save_pretrained(args.out)
    bits = heldout_bits_per_byte(model.float(), tokenizer)
    record = {
        "steps": args.steps,
        "tokens_per_step": BATCH * WINDOW,
        "learning_rate": args.lr,
        "seed": args.seed,
        "python": platform.python_version(),
        "heldout_modules": HELDOUT,
        "heldout_bits_per_byte": round(bits, 4),
    }
    (args.out / "run.pt").unlink(missing_ok=True)
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"held-out bits per byte: {bits:.3f}")


if __name__ == "__main__":
    main()
