"""Every architecture of docs/models.md against transformers: sites, logits, gradients."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")

from architectures import (  # noqa: E402
    PAIRS,
    forward_gap,
    gap_of,
    gradients,
    oracle_gradients,
    prove,
)
from click.testing import CliRunner  # noqa: E402
from quantised import quantised  # noqa: E402
from tokenized import tokenize_rows  # noqa: E402

from fpo_mlx.cli import main  # noqa: E402
from fpo_mlx.data import parse_row  # noqa: E402
from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.records import SITE_KINDS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIDE_BY_SIDE = {"cohere2", "gpt_neox"}  # attention and MLP: no stream between them
NO_RMS_NORM = {"cohere2", "gpt_neox", "gpt2", "olmo2"}  # before the MLP
WHOLE_SEQUENCES = {"qwen3_next"}  # some of its blocks keep a recurrent state, not keys and values
ARCHITECTURES = list(tiny_models.MAKERS)


def absent_from(name: str) -> set[str]:
    """Sites that this architecture does not have."""
    absent = {"resid_mid"} if name in SIDE_BY_SIDE else set()
    return absent | ({"mlp_in_unscaled"} if name in NO_RMS_NORM else set())


@pytest.fixture(scope="module")
def proof_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return functools.cache(lambda name: prove(tiny_models.MAKERS[name](root / name)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_at_every_site_of_every_block_are_transformers(proof_of, name):
    assert set(proof_of(name).kinds) == set(SITE_KINDS) - absent_from(name)
    assert proof_of(name).hidden < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_through_the_head_are_transformers(proof_of, name):
    assert proof_of(name).logits < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_gradient_of_the_fpo_loss_is_the_oracles(proof_of, name):
    assert proof_of(name).matrices >= 32  # LoRA on four blocks or more, two matrices a layer
    assert proof_of(name).gradient < 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompt_once_and_checkpointing_change_no_gradient(proof_of, name):
    assert proof_of(name).shares_prompt is (name not in WHOLE_SEQUENCES)
    assert proof_of(name).once < 1e-4


def test_a_model_that_takes_the_plain_path_trains_on_it_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "cache"))
    tiny_models.tiny_qwen3_next(tmp_path / "model", tokenizer=True)
    rows = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(3)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--objective", "dpo", "--iters", "2", "--batch-size", "1", "--num-layers", "2"]
    places = [f"--{key}={tmp_path / key}" for key in ("model", "data")]
    out = CliRunner().invoke(
        main, ["train", *places, *flags, "--adapter-path", str(tmp_path / "a")]
    )
    assert out.exit_code == 0, out.output
    assert out.output.count("prompts run twice per pair") == 1
    assert (tmp_path / "a" / "adapters.safetensors").is_file()


# Multi-turn data, quantised weights ---------------------------------------------------------------

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And the sea?"},
    {"role": "assistant", "content": "The rain."},
    {"role": "user", "content": "Why?"},
]
ROWS = [
    {"prompt": CONVERSATION, "chosen": "The stars are.", "rejected": "You asked the question."},
    {"prompt": CONVERSATION[1:4], "chosen": "The sea is in France.", "rejected": "No."},
]
# sizes that can be quantised: rows in groups of 32, qwen3_moe's router in groups of 64
QUANTISABLE = {
    "llama": {"intermediate_size": 64},
    "gemma2": {"intermediate_size": 64},
    "qwen3_moe": {"intermediate_size": 64, "hidden_size": 64, "moe_intermediate_size": 32},
}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def multi_turn(folder: Path):
    rows = [
        parse_row(row | {side: answer(row[side]) for side in ("chosen", "rejected")}, index=i)
        for i, row in enumerate(ROWS)
    ]
    return tokenize_rows(rows, load_tokenizer(folder), 512).pairs


@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "qwen3_next"])
def test_gradients_on_conversations_of_several_turns_are_the_oracles(tmp_path, name):
    folder = tiny_models.MAKERS[name](tmp_path, tokenizer=True)
    pairs = multi_turn(folder)
    assert min(len(pair.prompt) for pair in pairs) > 40
    ours = gradients(folder, pairs)
    assert gap_of(ours, oracle_gradients(folder, pairs, ours)) < 1e-3


@pytest.mark.parametrize("name", QUANTISABLE)
def test_quantised_models_on_several_turns_agree_with_transformers(tmp_path, name):
    """Same packed numbers; once dequantised at load (a CPU), once left packed (Apple silicon)."""
    settings = QUANTISABLE[name]
    whole = tiny_models.MAKERS[name](tmp_path / "float", tokenizer=True, **settings)
    folder = quantised(whole, tmp_path / "4bit")
    truth = rounded(whole, folder, tmp_path / "truth")
    _, hidden, logits = forward_gap(folder, truth)
    _, far, _ = forward_gap(folder, whole)
    assert hidden < 1e-4
    assert logits < 1e-4
    assert far > 0.01, "quantised weights that differ nowhere prove nothing"
    pairs = multi_turn(whole)
    ours = gradients(folder, pairs)
    wanted = oracle_gradients(truth, pairs, ours)
    assert gap_of(ours, wanted) < 1e-3
    assert gap_of(gradients(folder, PAIRS[1:], packed=True), gradients(folder, PAIRS[1:])) < 1e-3


def rounded(whole: Path, packed: Path, target: Path) -> Path:
    """The float folder with each weight that `packed` holds quantised rounded the same way."""
    from safetensors.numpy import load_file, save_file

    settings = json.loads((packed / "config.json").read_text())["quantization"]
    names = mx.load(str(packed / "model.safetensors"))
    weights, count = load_file(whole / "model.safetensors"), 0
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        for expert in range(4):
            module = module.replace(f".experts.{expert}.", ".switch_mlp.")
        if f"{module}.scales" in names:
            own = settings.get(module) or settings
            size, bits = own["group_size"], own["bits"]
            back = mx.dequantize(*mx.quantize(mx.array(array), size, bits), size, bits)
            weights[name], count = np.array(back), count + 1
    assert count >= 4 * 7
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((whole / "config.json").read_text())
    return target


# The docs -----------------------------------------------------------------------------------------


def test_the_table_of_the_docs_is_of_these_architectures_and_within_the_bounds():
    page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    table = (
        page.read_text(encoding="utf-8")
        .split("<!-- models: begin -->\n")[1]
        .split("<!-- models: end -->")[0]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0].strip("`") for row in rows] == ARCHITECTURES
    for name, sites, hidden, logits, gradient, once, _ in rows:
        assert int(sites) == len(SITE_KINDS) - len(absent_from(name.strip("`")))
        assert max(float(hidden), float(logits)) <= 1e-4
        assert float(gradient) <= 1e-3
        assert once == ("no" if name.strip("`") in WHOLE_SEQUENCES else "yes")
