"""Does a fused folder, a PEFT export and a GGUF give the same elsewhere as here?

Usage: elsewhere.py --model SMOLLM2 [--work FOLDER] [--only NAME,NAME]
Makes an environment each for transformers 4.51.3, transformers 5 with PEFT, and llama.cpp
(xllamacpp) in WORK/venvs, random adapters for SmolLM2 and for the tiny models of elsewhere_models,
fuses and exports them, and has every reader give the logits behind one prompt and twelve
greedy tokens. Prints the largest difference to mlx-lm with the adapters; exit code 1 if one
exceeds 1e-4, or another token is chosen. llama.cpp tells log-probs of the ten likeliest tokens;
its server sums the softmax over the vocabulary in float32, so all of them are off by one constant
(1.7e-4 for SmolLM2's 49,152 tokens): they are compared to the likeliest one's, as logits
would be, and to mlx-lm with llama.cpp's GELU.
An adapter that PEFT itself made and saved is read here, and compared with PEFT's own logits.
--peft-fixture FOLDER writes such an adapter of the suite's tiny Llama, with its logits, and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(Path(__file__).parent)]

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import tiny_models  # noqa: E402
from elsewhere_models import MAKERS  # noqa: E402
from mlx_lm import utils  # noqa: E402

from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.fuse import fuse  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.records import FusedForm  # noqa: E402

ENVIRONMENTS = {  # name -> (packages, whether torch is borrowed from this interpreter)
    "transformers 4.51.3": (("transformers==4.51.3", "huggingface_hub<1", "tokenizers<0.22"), True),
    "transformers 5": (("--no-deps", "peft>=0.18", "accelerate"), True),
    "llama.cpp": (("xllamacpp", "numpy"), False),
}
PROMPT, STEPS, TOLERANCE = "The capital of France is", 12, 1e-4
FIXED = [5, 17, 250, 3, 99, 42]  # tokens of the fixture

TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, base, ids, steps = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32,
    attn_implementation="eager")  # 4.51's sdpa leaves Gemma 2's soft-cap out
if folder != base:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder)
model.eval()
x = torch.tensor([ids]); out = []
with torch.no_grad():
    logits = model(input_ids=x).logits[0, -1]
    for _ in range(steps):
        out.append(int(model(input_ids=x).logits[0, -1].argmax()))
        x = torch.cat([x, torch.tensor([[out[-1]]])], 1)
tokens = AutoTokenizer.from_pretrained(base)
print(json.dumps({"logits": logits.tolist(), "greedy": out,
                  "ids": tokens(sys.argv[5], add_special_tokens=False)["input_ids"]}))
"""
PEFT_MAKES = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
base, out, ids, last, name = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), *sys.argv[4:6]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32,
    attn_implementation="eager")
config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], lora_dropout=0.0,
    layers_to_transform=[int(last) - 1, int(last)], task_type="CAUSAL_LM")
torch.manual_seed(0)
model = get_peft_model(model, config).eval()
for key, value in model.named_parameters():
    if "lora_B" in key: torch.nn.init.normal_(value, std=0.05)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
model.peft_config["default"].base_model_name_or_path = name
model.save_pretrained(out)
print(json.dumps(logits.tolist()))
"""
LLAMA_CPP = """
import json, sys, xllamacpp as x
p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256; p.warmup = False
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
try: p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
except AttributeError: pass
server = x.Server(p)
out = server.handle_completions({"prompt": sys.argv[2], "max_tokens": int(sys.argv[3]), "n_predict":
    int(sys.argv[3]), "temperature": 0, "n_probs": 10, "logprobs": 10, "return_tokens": True,
    "cache_prompt": False})
sys.stdout.write("\\n@@" + json.dumps(out) + "\\n"); sys.stdout.flush()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="SmolLM2 as an MLX folder of float32")
    parser.add_argument("--work", type=Path, default=Path(".elsewhere"))
    parser.add_argument("--only", default="", help="names of models, with commas")
    parser.add_argument("--peft-fixture", type=Path, help="write PEFT's adapter there, and end")
    options = parser.parse_args()
    work = options.work.resolve()
    if options.peft_fixture:
        return peft_fixture(options.peft_fixture, work)
    readers = {name: environment(work / "venvs", name) for name in ENVIRONMENTS}
    faults = 0
    for name in options.only.split(",") if options.only else ["smollm2", *MAKERS]:
        base = options.model if name == "smollm2" else MAKERS[name](work / name / "base")
        faults += check(name, Path(base), work / name, readers)
    return min(faults, 1)


def peft_fixture(folder: Path, work: Path) -> int:
    """An adapter of `tiny_llama` that PEFT made, and logits.json with PEFT's answer to FIXED."""
    base = tiny_models.tiny_llama(work / "tiny-llama")
    logits = made_by_peft(environment(work / "venvs", "transformers 5"), base, folder, FIXED)
    about = {"tokens": FIXED, "logits": [round(float(x), 6) for x in logits]}
    (folder / "logits.json").write_text(json.dumps(about) + "\n")
    (folder / "README.md").unlink()  # an empty form of PEFT's
    return 0


def made_by_peft(python: Path, base: Path, folder: Path, ids: list[int]) -> np.ndarray:
    """Have PEFT make a LoRA of the last two blocks, alpha 10 of rank 4; its last logits."""
    last = json.loads((base / "config.json").read_text())["num_hidden_layers"] - 1
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run: it shall not be read as this one
    words = (str(base), str(folder), json.dumps(ids), str(last), base.name)
    return np.array(json.loads(run(python, PEFT_MAKES, *words).splitlines()[-1]))


def environment(root: Path, name: str) -> Path:
    """The interpreter of a virtual environment with what a reader needs, made if absent."""
    packages, borrow = ENVIRONMENTS[name]
    folder = root / name.replace(" ", "-")
    python = folder / "bin/python"
    if not (folder / ".whole").is_file():
        venv.create(folder, with_pip=True)
        if borrow:  # torch and what else is not given here
            place = next(folder.glob("lib/python*/site-packages"))
            (place / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--ignore-installed", *packages]
        subprocess.run(pip, check=True)
        (folder / ".whole").touch()
    return python


def check(name: str, base: Path, work: Path, readers: dict[str, Path]) -> int:
    """Print one line per reader; the number of readers that differ."""
    work.mkdir(parents=True, exist_ok=True)
    adapter = make_adapter(base, work / "adapter")
    want, greedy, ids = here(base, adapter)
    fuse(str(base), adapter, work / "fused", FusedForm(dtype="float32", gguf_path="model.gguf"))
    shutil.rmtree(work / "peft", ignore_errors=True)
    adapters.export_peft(adapter, work / "peft", "owner/name")
    fused = str(work / "fused")
    words = (json.dumps(ids), str(STEPS), PROMPT)
    found = {"mlx-lm": here(work / "fused", None)[:2]}
    found["our PEFT, read here"] = here(base, work / "peft")[:2]
    for reader in ("transformers 4.51.3", "transformers 5"):
        found[reader] = told(readers[reader], TRANSFORMERS, fused, fused, *words, ids=ids)
    peft = (str(work / "peft"), str(base), *words)
    found["PEFT"] = told(readers["transformers 5"], TRANSFORMERS, *peft, ids=ids)
    faults = 0
    for reader, (logits, answer) in found.items():
        gap = float(np.abs(logits - want).max())
        faults += say(name, reader, gap, answer == greedy)
    theirs = made_by_peft(readers["transformers 5"], base, work / "made-by-peft", ids)
    read = here(base, work / "made-by-peft")[0]
    same = int(read.argmax()) == int(theirs.argmax())
    faults += say(name, "PEFT's, read here", float(np.abs(read - theirs).max()), same)
    with gelu_of_llama_cpp():
        want = here(work / "fused", None)[0]
    gap, same = llama_cpp(readers["llama.cpp"], work / "fused", want, greedy)
    return faults + say(name, "llama.cpp", gap, same)


def say(name: str, reader: str, gap: float, same: bool) -> int:
    bad = not (gap <= TOLERANCE and same)
    answer = "same" if same else "ANOTHER"
    verdict = "WRONG" if bad else "ok"
    print(f"{name:<10} {reader:<20} {gap:9.2e}  {answer} greedy answer  {verdict}", flush=True)
    return int(bad)


@contextmanager
def gelu_of_llama_cpp() -> Iterator[None]:
    """GELU through float16, a table of which llama.cpp keeps for CPUs: 1e-3 in Gemma 3's logits."""
    exact = nn.gelu_approx

    def of_table(x: mx.array) -> mx.array:
        rounded = x.astype(mx.float16).astype(mx.float32)
        return exact(rounded).astype(mx.float16).astype(x.dtype)

    nn.gelu_approx = of_table
    try:
        yield
    finally:
        nn.gelu_approx = exact


def make_adapter(base: Path, folder: Path) -> Path:
    """Random LoRA on the last two blocks, large enough to change the answer."""
    model = load_model(base).model
    last = len(model.layers) - 1
    n, paths = adapters.adapted_paths(model, 2, last, ["self_attn.q_proj", "mlp.down_proj"])
    spec = adapters.AdapterSpec("lora", n, 4, 2.0, 0.0, paths)
    adapters.attach(model, spec)
    rng = np.random.default_rng(0)
    values = {
        k: mx.array(rng.normal(size=v.shape).astype(np.float32) * 0.05)
        for k, v in adapters.parameters(model)
    }
    folder.mkdir(parents=True, exist_ok=True)
    adapters.save(folder / adapters.WEIGHTS, values)
    (folder / adapters.CONFIG).write_text(json.dumps(spec.as_config(str(base))))
    return folder


def here(folder: Path, adapter: Path | None) -> tuple[np.ndarray, list[int], list[int]]:
    """Last logits, greedy tokens and prompt ids by mlx-lm; adapter: of mlx-lm's or PEFT's kind."""
    model, tokenizer = utils.load(str(folder))[:2]
    if adapter:
        adapters.load(model, adapter)
    ids = list(tokenizer.encode(PROMPT, add_special_tokens=False))
    out: list[int] = []
    first = None
    for _ in range(STEPS):
        logits = np.array(model(mx.array([ids + out])).astype(mx.float32))[0, -1]
        first = logits if first is None else first
        out.append(int(logits.argmax()))
    assert first is not None
    return first, out, ids


def told(python: Path, code: str, *words: str, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    answer: Any = json.loads(run(python, code, *words).splitlines()[-1])
    if answer["ids"] != ids:
        raise SystemExit(f"{python}: another tokenization: {answer['ids']} instead of {ids}")
    return np.array(answer["logits"]), answer["greedy"]


def run(python: Path, code: str, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", code, *words], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def llama_cpp(
    python: Path, folder: Path, want: np.ndarray, greedy: list[int]
) -> tuple[float, bool]:
    """(largest difference of a logit among the ten likeliest, up to a constant; same tokens?)."""
    out = run(python, LLAMA_CPP, str(folder / "model.gguf"), PROMPT, str(STEPS))
    answer = json.loads(next(line for line in out.splitlines() if line.startswith("@@"))[2:])
    tokens = answer["choices"][0]["logprobs"]["content"]
    top = tokens[0]["top_logprobs"]
    theirs = np.array([entry["logprob"] - top[0]["logprob"] for entry in top])
    ours = np.array([want[entry["id"]] - want[top[0]["id"]] for entry in top], np.float64)
    gap = np.abs(theirs - ours).max()
    # the server lists half a character's tokens as one, so some of `greedy` are not in its list
    listed, left = [token["id"] for token in tokens], iter(greedy)
    whole = len(listed) >= STEPS // 2 and listed[0] == greedy[0]
    return float(gap), whole and all(token in left for token in listed)


if __name__ == "__main__":
    sys.exit(main())
