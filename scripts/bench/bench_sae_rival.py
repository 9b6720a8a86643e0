"""One rival of bench_sae.py, in its own environment: trains, writes figures as JSON.

    python bench_sae_rival.py saelens|sparsify TRAIN.npy HELD.npy OUT.json SETTINGS-AS-JSON

SAELens runs its own SAETrainer. sparsify's Trainer wants a language model, so its step is called
here as its trainer calls it: unit-norm decoder, forward, AuxK, gradient projection, its optimizer.
SAELens' use_sparse_activations is off: its backward pass fails on a CPU (torch 2.13).
"""

import json
import sys
import time

import numpy as np
import torch
from resident import own_peak_bytes


def batches(rows, size, seed):
    order = np.random.default_rng(seed)
    while True:
        index = order.permutation(len(rows))
        for at in range(0, len(rows) - size + 1, size):
            yield rows[torch.from_numpy(index[at : at + size])]


def saelens(rows, s):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=rows.shape[1], d_sae=s["width"], k=s["k"], dtype="float32", device="cpu",
            apply_b_dec_to_input=True, normalize_activations="expected_average_only_in",
        )
    )  # fmt: skip
    steps = s["tokens"] // s["batch"]
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * s["batch"], train_batch_size_samples=s["batch"],
            lr=s["lr"], lr_end=s["lr"] / 10, lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 2, device="cpu",
            dead_feature_window=max(steps // 10, 4), n_batches_for_norm_estimate=10,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae, batches(rows, s["batch"], 0),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start

    def run(x):
        acts = sae.encode(x)
        return sae.decode(acts), acts > 0

    return run, seconds


def sparsify(rows, s):
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    sae = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=s["width"], k=s["k"]))
    steps, after = s["tokens"] // s["batch"], s["tokens"] // 10
    if s["optimizer"] == "adam":
        optimizer = torch.optim.Adam(sae.parameters(), lr=s["lr"])
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    else:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=s["lr"]), momentum=0.95)
        optimizer.train()
        schedule = None
    unused = torch.zeros(s["width"], dtype=torch.long)
    stream = batches(rows, s["batch"], 0)
    start = time.perf_counter()
    for step in range(steps):
        x = next(stream)
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=unused > after if s["aux"] else None)
        (out.fvu + s["aux"] * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        unused += len(x)
        unused[out.latent_indices.flatten()] = 0
    seconds = time.perf_counter() - start
    if schedule is None:
        optimizer.eval()
    sae.set_decoder_norm_to_unit_norm()

    def run(x):
        acts, index, _ = sae.encode(x)
        live = torch.zeros(len(x), s["width"]).scatter(1, index, acts) > 0
        return sae.decode(acts, index), live

    return run, seconds


def main():
    name, train, held, out, settings = sys.argv[1:]
    s = json.loads(settings)
    torch.set_num_threads(s["threads"])
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(train))
    run, seconds = {"saelens": saelens, "sparsify": sparsify}[name](rows, s)
    peak = own_peak_bytes() / 1e9
    x = torch.from_numpy(np.load(held))
    error = active = 0.0
    used = torch.zeros(s["width"], dtype=torch.bool)
    with torch.no_grad():
        for part in x.split(1024):
            recon, live = run(part)
            error += (part - recon).double().pow(2).sum().item()
            active += live.sum().item()
            used |= live.any(0)
    variance = (x - x.mean(0)).double().pow(2).sum().item()
    figures = {
        "fvu": error / variance, "l0": active / len(x), "dead": 1 - used.float().mean().item(),
        "tokens_per_second": s["tokens"] // s["batch"] * s["batch"] / seconds,
        "peak_memory_gb": peak,
    }  # fmt: skip
    with open(out, "w") as stream:
        json.dump(figures, stream)


if __name__ == "__main__":
    main()
