"""Trains the demo's SAE: TopK on the residual stream of SmolLM2-135M-Instruct, float16 on disk.

    python scripts/make_demo_sae.py --chats chats.jsonl [--chats more.jsonl] [--model FOLDER]

The text is what scripts/make_demo_text.py writes, and the demo's own pairs. Needs the extra
`torch`. Method: TopK SAE with an auxiliary loss for dead features (Gao et al., 2024,
arXiv 2406.04093): Adam, decoder rows of length 1, warm-up and linear decay.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_demo_text import PAIRS
from safetensors.numpy import save_file

from fpo_mlx.demo import smollm2

DEMO = Path(__file__).resolve().parent.parent / "fpo_mlx" / "demo"
LAYER = 27  # 0-based; the model has 30
FEATURES, K = 1024, 32
DEAD_AFTER = 30_000  # rows without a single use
AUX_K, AUX_WEIGHT = 128, 1 / 32
PREFIX_SHARE = 0.1  # of the texts whose common beginning (the system prompt) is kept


@dataclass
class Sae:
    """x [N, D] -> the k largest of (x - b_dec) @ w_enc + b_enc, not below 0 -> @ w_dec + b_dec."""

    w_enc: torch.Tensor  # [D, F]
    b_enc: torch.Tensor  # [F]
    w_dec: torch.Tensor  # [F, D], rows of length 1
    b_dec: torch.Tensor  # [D]

    def parameters(self) -> list[torch.Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]

    def pre(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.b_dec) @ self.w_enc + self.b_enc  # [N, F]


def topk(pre: torch.Tensor, k: int) -> torch.Tensor:
    """pre [N, F] with all but the k largest of each row, and the negative ones, at 0."""
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def conversations(paths: Sequence[Path]) -> list[list[dict[str, str]]]:
    """Chats as they are; of a pair, both answers."""
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "messages" in row:
                found.append(row["messages"])
                continue
            for answer in (row["chosen"], row["rejected"]):
                user = {"role": "user", "content": row["prompt"]}
                found.append([user, {"role": "assistant", "content": answer}])
    return found


def activations(
    folder: Path, chats: Sequence[list[dict[str, str]]], rng: random.Random, exact: bool
) -> torch.Tensor:
    """Residual stream after block LAYER, [rows, D] float32, without each text's first position.

    exact: all in float32; otherwise the matrix products are bfloat16, the stream itself float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    model.layers = model.layers[: LAYER + 1]
    model.norm = torch.nn.Identity()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    ids = sorted(tokenizer(texts)["input_ids"], key=len)
    prefix = common_prefix(ids)
    rows = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=not exact):
        for batch in batches(ids, tokens=4096):
            tokens, mask = padded(batch, tokenizer.pad_token_id)  # [B, L]
            hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state  # [B, L, D]
            for length, states in zip(map(len, batch), hidden, strict=True):
                start = 1 if rng.random() < PREFIX_SHARE else max(prefix, 1)
                rows.append(states[start:length].float())
    return torch.cat(rows)


def common_prefix(ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts share at their beginning."""
    first, last = min(ids), max(ids)
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


def batches(ids: Sequence[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """Neighbours of the sorted texts, at most `tokens` padded tokens at a time."""
    batch: list[list[int]] = []
    for text in ids:
        if batch and len(text) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def padded(batch: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (tokens [B, L], mask [B, L])."""
    tensors = [torch.tensor(text) for text in batch]
    tokens = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(text) for text in batch])
    return tokens, (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()


def train(x: torch.Tensor, args: argparse.Namespace) -> Sae:
    """x: [rows, D], scaled to a mean square of 1. Prints its progress."""
    generator = torch.Generator().manual_seed(args.seed)
    sae = fresh(x, generator)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr, betas=(0.9, 0.999))
    steps = args.passes * (len(x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    unused = torch.zeros(FEATURES)  # rows since a feature's last use
    step = 0
    for _ in range(args.passes):
        order = torch.randperm(len(x), generator=generator)
        for at in range(0, len(x) - args.batch_size + 1, args.batch_size):
            batch = x[order[at : at + args.batch_size]]
            acts, loss = update(sae, optimizer, batch, unused > DEAD_AFTER)
            schedule.step()
            unused += len(batch)
            unused[(acts > 0).any(dim=0)] = 0
            if step % 100 == 0:
                dead = (unused > DEAD_AFTER).float().mean().item()
                print(f"step {step}/{steps} loss {loss:.4f} dead {dead:.3f}", flush=True)
            step += 1
    return sae


def fresh(x: torch.Tensor, generator: torch.Generator) -> Sae:
    """Random decoder rows of length 1, the encoder their transpose, the bias the mean."""
    w_dec = torch.randn(FEATURES, x.shape[1], generator=generator)
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    arrays = (w_dec.T.contiguous(), torch.zeros(FEATURES), w_dec, x.mean(dim=0))
    return Sae(*(array.clone().requires_grad_() for array in arrays))


def rate(step: int, steps: int) -> float:
    """Warm-up over 5 % of the steps, decay to 0 over the last 30 %."""
    return min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.3 * steps))


def update(
    sae: Sae, optimizer: torch.optim.Optimizer, x: torch.Tensor, dead: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """One step; (acts [N, F], share of the batch's variance that is not explained)."""
    pre = sae.pre(x)
    acts = topk(pre, K)
    error = x - (acts @ sae.w_dec + sae.b_dec)
    variance = (x - x.mean(dim=0)).pow(2).sum()
    fvu = error.pow(2).sum() / variance
    loss = fvu
    if (count := int(dead.sum())) > 0:  # dead features learn what the living ones leave over
        spare = topk(pre.masked_fill(~dead, -1e9), min(AUX_K, count)) @ sae.w_dec
        rest = error.detach()
        loss = fvu + AUX_WEIGHT * (rest - spare).pow(2).sum() / rest.pow(2).sum()
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():  # no step along a decoder row, then its length back to 1
        grad = sae.w_dec.grad
        assert grad is not None
        grad -= (grad * sae.w_dec).sum(dim=1, keepdim=True) * sae.w_dec
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.w_dec /= sae.w_dec.norm(dim=1, keepdim=True)
    return acts.detach(), fvu.item()


def write(sae: Sae, scale: float, folder: Path) -> None:
    """SAELens' layout, float16. scale: what the activations were multiplied with in training."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "W_enc": sae.w_enc,
        "W_dec": sae.w_dec,
        "b_enc": sae.b_enc / scale,
        "b_dec": sae.b_dec / scale,
    }
    halves = {key: value.detach().numpy().astype(np.float16) for key, value in arrays.items()}
    assert all(np.isfinite(value).all() for value in halves.values())
    config: dict[str, Any] = {
        "architecture": "topk",
        "d_in": sae.w_dec.shape[1],
        "d_sae": FEATURES,
        "k": K,
        "dtype": "float16",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "model_name": "SmolLM2-135M-Instruct",
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "hf_hook_name": f"model.layers.{LAYER}.output",
            "prepend_bos": False,
        },
    }
    save_file(halves, folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").chmod(0o644)
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, x: torch.Tensor) -> str:
    """Held-out figures of the files as they are read back, x: [rows, D] unscaled float32."""
    from fpo_mlx.sae.encode import decode, encode
    from fpo_mlx.sae.families import load_sae

    sae, rows = load_sae(folder), x.numpy()
    acts = encode(sae, rows)
    error = np.square(rows - decode(sae, acts, rows)).sum()
    fvu = error / np.square(rows - rows.mean(axis=0)).sum()
    l0 = (acts > 0).sum(axis=1).mean()
    dead = 1 - (acts > 0).any(axis=0).mean()
    return f"held out, {len(rows)} rows: FVU {fvu:.4f}, L0 {l0:.2f}, never used {dead:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chats", type=Path, action="append", required=True)
    parser.add_argument("--model", type=Path, default=smollm2.model_folders().full)
    parser.add_argument("--output", type=Path, default=DEMO / "sae")
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng, started = random.Random(args.seed), time.monotonic()
    chats = conversations(args.chats)
    rng.shuffle(chats)
    held_out = len(chats) // 20
    pairs = conversations([PAIRS])
    test_pairs = conversations([PAIRS.with_name("valid.jsonl")])
    x = activations(args.model, [*chats[held_out:], *pairs], rng, exact=False)
    test = activations(args.model, [*chats[:held_out], *test_pairs], rng, exact=True)
    print(f"{len(x)} rows, {time.monotonic() - started:.0f} s", flush=True)
    scale = float(x.pow(2).mean().rsqrt())
    sae = train(x * scale, args)
    write(sae, scale, args.output)
    print(f"{time.monotonic() - started:.0f} s, scale {scale:.5f}")
    print(measure(args.output, test))


if __name__ == "__main__":
    main()
