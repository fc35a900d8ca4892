# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""Train the embedded model: a 5 M parameter Llama on the source of Python's standard library.

    python examples/tiny_llama/train.py --steps 2700

Learns the tokenizer (byte-level BPE, 2048 tokens) and the model from the training split, measures perplexity on the
whole held-out split (context 256) and writes tokenizer, bf16 weights and `training.json` beside this file. A
checkpoint is kept in `--work`; the same command goes on from it after an interruption.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stdlib_data import stdlib_texts  # noqa: E402


HERE = Path(__file__).resolve().parent
CONTEXT = 256
EOS = "<|endoftext|>"


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, in fp32 (torch's own works in bf16, slow on CPUs without it).

    Update of a matrix (out, in): 0.2 * sqrt(max(out, in)) * lr * orthogonal(Nesterov momentum), decoupled weight
    decay. Keller Jordan's blog post on Muon, scale of arXiv 2502.16982.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                x = torch.stack(updates)
                tall = shape[0] > shape[1]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if tall else x
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=scale)


def build_tokenizer(folder: Path, texts: list[str]):
    """Byte-level BPE of 2048 tokens learned from the training split; loaded back if `folder` has one."""
    if not (folder / "tokenizer.json").exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocab_size=2048, min_frequency=2, special_tokens=[EOS], show_progress=False)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT
        ).save_pretrained(folder)
        # transformers 5 writes a class name that 4.57 does not know; both know this one.
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one row of token ids, each text closed by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


def build_model(vocab_size: int, eos: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=eos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


@torch.no_grad()
def perplexity(model, tokens: torch.Tensor, batch: int = 32) -> float:
    """Token-level perplexity over all full blocks of 256 tokens, 255 predictions each."""
    blocks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    model.eval()
    nll = sum(model(input_ids=rows, labels=rows).loss.item() * len(rows) for rows in blocks.split(batch))
    model.train()
    return math.exp(nll / len(blocks))


def learning_rate(step: int, steps: int, warmup: int = 60, decay: float = 0.45) -> float:
    """Warm-up, constant, then linear decay to zero over the last `decay` of the steps, as a factor in [0, 1]."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2700, help="optimizer steps of batch x 256 tokens")
    parser.add_argument("--batch", type=int, default=32, help="blocks of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="where tokenizer and weights are written")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where the checkpoint is kept")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    library = list(stdlib_texts("train").values())
    tests = list(stdlib_texts("train", test_packages=True).values())
    tokenizer = build_tokenizer(args.out, library)
    library_tokens = tokenize(tokenizer, library)
    # The library's own files count twice: they are what the model is measured on.
    data = torch.cat([library_tokens, library_tokens, tokenize(tokenizer, tests)])
    held_out = tokenize(tokenizer, list(stdlib_texts("held_out").values()))
    print(f"{len(library_tokens):,} library tokens, {len(data):,} with tests, {len(held_out):,} held out", flush=True)

    model = build_model(len(tokenizer), tokenizer.eos_token_id)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    first, seconds = 0, 0.0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]

    compiled = torch.compile(model)
    begun, loss_sum = time.time(), 0.0
    for step in range(first, args.steps):
        # Seeded by step: a resumed run sees the same blocks as an uninterrupted one.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(len(data) - CONTEXT, (args.batch,), generator=generator)
        rows = torch.stack([data[s : s + CONTEXT] for s in starts.tolist()])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(step, args.steps)
        loss = compiled(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.item()
        done = step + 1
        if done % 50 == 0:
            rate = (done - first) * args.batch * CONTEXT / (time.time() - begun)
            print(f"step {done} loss {loss_sum / 50:.4f} tokens/s {rate:.0f}", flush=True)
            loss_sum = 0.0
        if done % 200 == 0 or done == args.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "seconds": seconds + time.time() - begun,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            sample = held_out if done == args.steps else held_out[: 128 * CONTEXT]
            print(f"step {done} held-out perplexity {perplexity(model, sample):.3f}", flush=True)

    model.to(torch.bfloat16).save_pretrained(args.out)
    record = {
        "steps": args.steps,
        "tokens_per_step": args.batch * CONTEXT,
        "learning_rate": args.lr,
        "seed": args.seed,
        "library_tokens": len(library_tokens),
        "training_tokens_in_an_epoch": len(data),
        "held_out_tokens": len(held_out),
        "held_out_perplexity": round(perplexity(model.float(), held_out), 3),
        "seconds": round(seconds + time.time() - begun),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
