"""Predictions: counted by hand on one small shape, and what must hold for every shape."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_mlx.machine import fits, memory
from fpo_mlx.machine.fits import Case
from fpo_mlx.machine.memory import Lengths, ModelShape, Pass, SaeShape, Setup, Tiles

MODEL = ModelShape(
    blocks=30, hidden=576, heads=9, kv_heads=3, head_dim=64, inner=1536, vocab=49152,
    weights=538_060_032, block_parameters=3_538_944, value_bytes=4,
)  # fmt: skip
SETUP = Setup(14, 29, 1_302_528, micro_batch_size=1, batch_size=1)
TILES = Tiles(2048, 1024, 1 << 21)
SAE = SaeShape(4096, 576)
PAIR = Lengths(256, 90, 70)
CASE = Case(MODEL, (SAE,), SETUP, TILES, (PAIR,))


def test_the_backbone_is_called_as_the_policy_calls_it():
    """The prompt goes with the chosen response; the rejected one sees it and itself."""
    assert memory.passes(PAIR, share_prompt=True) == [Pass(1, 345, 345), Pass(1, 70, 325)]
    apart = memory.passes(Lengths(76, 154, 77), share_prompt=True)
    assert apart == [Pass(1, 229, 229), Pass(1, 77, 152)]
    assert memory.passes(PAIR, share_prompt=False) == [Pass(2, 345, 345)]
    assert memory.passes(Lengths(1, 4, 4), share_prompt=True) == [Pass(1, 4, 4)] * 2


def test_a_gpus_micro_batch_is_one_pass_with_masks_of_its_own():
    """Every pair's block is in work at once, and the rejected responses may write their scores."""
    setup, tiles = replace(SETUP, micro_batch_size=3), replace(TILES, together=True)
    apart = memory._calls(MODEL, setup, TILES, PAIR)
    assert apart == [Pass(1, 345, 345), Pass(1, 70, 325)] * 3
    calls = memory._calls(MODEL, setup, tiles, PAIR)
    assert calls == [Pass(3, 345, 345), Pass(3, 70, 325, masked=True)]
    assert memory._calls(MODEL, SETUP, tiles, PAIR) == memory.passes(PAIR, share_prompt=True)
    fused = replace(MODEL, fused_attention=True)
    assert [memory._scores(fused, call) for call in calls] == [0, 4 * fused.heads * 3 * 70 * 325]


def test_whole_sequences_of_a_micro_batch_are_one_pass_on_every_device():
    """Where no prompt is shared, all 2n lie side by side, padded, and n pairs' block is in work."""
    model, setup = replace(MODEL, shares_prompt=False), replace(SETUP, micro_batch_size=3)
    for tiles in (TILES, replace(TILES, together=True)):
        assert memory._calls(model, setup, tiles, PAIR) == [Pass(6, 345, 345)]
        assert memory._calls(model, SETUP, tiles, PAIR) == [Pass(2, 345, 345)]
    terms = [
        {term.name: term.bytes for term in memory.train_terms(model, (), one, TILES, PAIR)}
        for one in (SETUP, setup)
    ]
    one, three = (found["block in work, loss or pooling"] for found in terms)
    assert three == pytest.approx(3 * one)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_a_policy_makes_the_passes_that_are_counted(place, share, together):
    from helpers import random_pairs

    from fpo_mlx.machine import device
    from fpo_mlx.model.load import load_model
    from fpo_mlx.model.policy import Policy

    loaded, seen = load_model(place / "model"), []
    policy = Policy(loaded.model, loaded.config, share_prompt=share)
    with device.using(replace(device.cpu(), together=together)):
        _ = policy._row_axes  # looks at masks with passes of its own
        backbone = policy.backbone
        policy.backbone = lambda tokens, cache=None: (
            seen.append(tokens.shape) or backbone(tokens, cache=cache)
        )
        policy.rows(random_pairs([(9, 5, 8)] * 3))
        model = replace(MODEL, shares_prompt=policy.shares_prompt)
        setup = replace(SETUP, micro_batch_size=3)
        counted = memory._calls(model, setup, Tiles.of(device.here()), Lengths(9, 5, 8))
    assert seen == [(one.n, one.new) for one in counted]


def test_a_lopsided_pair_that_is_padded_to_its_longer_answer_is_looked_at():
    """Neither its tokens nor its prompt stand out; its longer answer is taken twice."""
    usual = [Lengths(100 + n, 1100, 1100) for n in range(60)]
    lopsided = Lengths(100, 2000, 10)
    model = replace(MODEL, shares_prompt=False)
    found = replace(CASE, model=model, lengths=fits.heaviest([*usual, lopsided]))
    assert found.peak == replace(found, lengths=(lopsided,)).peak
    assert found.peak > replace(found, lengths=tuple(usual)).peak


@pytest.mark.parametrize(
    ("pair", "again", "micro", "measured"),
    [
        (Lengths(256, 90, 70), False, 1, 975.4e6),
        (Lengths(76, 154, 77), False, 1, 840.7e6),
        (Lengths(512, 256, 256), False, 1, 1753.4e6),
        (Lengths(256, 90, 70), True, 1, 650.7e6),
        (Lengths(76, 154, 77), True, 1, 621.3e6),
        (Lengths(512, 256, 256), True, 1, 780.9e6),
        (Lengths(76, 154, 77), True, 2, 656.3e6),
    ],
)
def test_peaks_that_were_measured_are_predicted_within_15_percent(pair, again, micro, measured):
    """SmolLM2-135M in float32, LoRA rank 8 on 16 blocks: scripts/bench/plan.py measured these."""
    setup = replace(SETUP, grad_checkpoint=again, micro_batch_size=micro, batch_size=micro)
    terms = memory.train_terms(MODEL, (SAE,), setup, TILES, pair)
    assert memory.total(terms) == pytest.approx(measured, rel=0.15)


def test_a_head_in_half_precision_counts_one_wide_tile_by_hand():
    """V = 10, D = 2, 8 values of the matrix at once: 3 tiles of 4 columns, for 4 of the 5 rows.

    The tile 8 values, its logits three times 16, the pulls of three tiles 24; slopes as ever.
    """
    small = ModelShape(1, 2, 0, 0, 0, 4, 10, 0, 100, 2, half_head=True)
    tiles = Tiles(2048, 4, 1 << 21, row_elements=40, wide_elements=8)
    assert memory._head(small, tiles, 5, grad=False, kl=False) == 4 * (8 + 48)
    assert memory._head(small, tiles, 5, grad=True, kl=False) == 4 * (8 + 48 + 24) + 120
    packed = replace(small, half_head=False)
    assert memory._head(packed, tiles, 5, grad=False, kl=False) == 4 * 3 * 40


def test_measured_peaks_of_tdpo2_a_wide_sae_and_precompute_are_predicted_too():
    pair = Lengths(76, 154, 77)
    kl = memory.train_terms(MODEL, (), replace(SETUP, kl=True), TILES, pair)
    assert memory.total(kl) == pytest.approx(856.0e6, rel=0.15)
    wide = memory.train_terms(MODEL, (SaeShape(65536, 576),), SETUP, TILES, PAIR)
    assert memory.total(wide) == pytest.approx(1203.2e6, rel=0.15)
    first = memory.precompute_terms(MODEL, (SaeShape(16384, 576),), TILES, Lengths(512, 256, 256))
    assert memory.total(first) == pytest.approx(659.5e6, rel=0.15)


def test_the_terms_that_need_no_constant_are_counted_by_hand():
    terms = {term.name: term.bytes for term in CASE.terms()}
    assert terms["model weights"] == 538_060_032
    assert terms["SAE weights"] == 4 * 4096 * (576 + 2)
    # now, before, at the start, two moments
    assert terms["adapters and optimizer"] == 5 * 1_302_528 * 4
    assert terms["gradients"] == 4 * 1_302_528
    assert list(terms.values()) == sorted(terms.values(), reverse=True)


LENGTHS = st.builds(
    Lengths, st.integers(1, 3000), st.integers(1, 1000), st.integers(1, 1000)
)  # fmt: skip


@settings(max_examples=100)
@given(LENGTHS, st.integers(1, 8), st.sampled_from(["adam", "sgd"]))
def test_what_saves_memory_is_predicted_to_save_it(pair, micro, optimizer):
    setup = replace(SETUP, micro_batch_size=micro, batch_size=16, optimizer=optimizer)
    case = replace(CASE, setup=setup, lengths=(pair,))
    more = replace(case, setup=replace(setup, micro_batch_size=micro + 1))
    assert memory.total(case.terms()) <= more.peak
    assert fits.fewer(case, 4).peak < case.peak
    assert case.cut(64).peak <= case.peak
    assert memory.total(memory.precompute_terms(MODEL, (SAE,), TILES, pair)) < case.peak


def test_the_largest_settings_that_fit_do_fit_and_the_next_do_not():
    case = replace(CASE, setup=replace(SETUP, batch_size=16))
    most = fits.largest_micro_batch(case, 2e9)
    peak = [
        replace(case, setup=replace(case.setup, micro_batch_size=n)).peak for n in (most, most + 1)
    ]
    assert peak[0] <= 2e9 < peak[1]
    assert fits.largest_micro_batch(case, 100e9) == 16  # no more than an update has
    longest = fits.longest_sequence(CASE, 2e9)
    peak = [
        replace(CASE, lengths=(Lengths(n // 2, n - n // 2, n - n // 2),)).peak
        for n in (longest, longest + 2)
    ]
    assert peak[0] <= 2e9 < peak[1]
    assert fits.longest_sequence(CASE, 0.5e9) == 0  # not even the weights


def test_advice_begins_with_what_changes_no_result():
    case = replace(CASE, setup=replace(SETUP, micro_batch_size=4, batch_size=4))
    found = fits.changes(case)
    assert found[0].flags == ("--micro-batch-size 1",)
    assert found[1].flags == ("--micro-batch-size 1", "--grad-checkpoint")
    assert all(change.case.peak < case.peak for change in found)


def test_the_first_way_out_is_named_with_what_it_builds_on():
    long = Lengths(3000, 900, 700)
    case = replace(CASE, setup=replace(SETUP, micro_batch_size=4, batch_size=4), lengths=(long,))
    found = fits.changes(case)
    for change in found:
        named = fits.way_out(case, change.case.need)
        assert named is not None
        assert named.case.need <= change.case.need
    least = min(found, key=lambda change: change.case.need)
    assert fits.way_out(case, least.case.need) == least
    assert fits.way_out(case, least.case.need - 1) is None
    for again in (False, True):  # whether the run has checkpoints already
        now = replace(case, setup=replace(case.setup, grad_checkpoint=again))
        flags = [one.flags for one in fits.changes(now)]
        assert ("--micro-batch-size 1", "--gradient forward") in flags
    assert found[-1].flags == ("--micro-batch-size 1", "--grad-checkpoint", "--max-seq-length 256")


def test_what_a_change_is_said_to_need_is_what_its_flags_alone_need():
    """A step that saves nothing is no part of those behind it: checkpoints of one block do not."""
    case = replace(CASE, setup=replace(SETUP, first_adapted=29), lengths=(Lengths(3000, 90, 70),))
    again = replace(case.setup, grad_checkpoint=True)
    assert replace(case, setup=again).peak > case.peak
    found = fits.changes(case)
    assert [change.flags for change in found][-1] == ("--max-seq-length 256",)
    for change in found:
        assert change.case.setup.grad_checkpoint is ("--grad-checkpoint" in change.flags)


def test_what_the_pairs_hold_counts_wherever_it_is_asked_what_fits():
    more = replace(CASE, data=1e9)
    assert more.peak == CASE.peak  # what MLX measures
    assert more.need == CASE.need + 1e9
    assert fits.longest_sequence(more, 3e9) == fits.longest_sequence(CASE, 2e9)
    assert fits.way_out(more, CASE.need) is None


def test_settings_that_a_run_may_not_change_are_no_advice():
    def flags(*fixed):
        case = replace(CASE, fixed=frozenset(fixed), lengths=(Lengths(3000, 90, 70),))
        return {flag.split()[0] for change in fits.changes(case) for flag in change.flags}

    ways = {"--grad-checkpoint", "--gradient", "--num-layers", "--max-seq-length"}
    assert flags() == ways
    assert flags("num_layers") == ways - {"--num-layers"}
    assert flags("num_layers", "gradient", "max_seq_length") == {"--grad-checkpoint"}


def test_flops_are_two_a_weight_and_token_and_the_backward_as_many_from_the_adapters_on():
    """One block, no attention to speak of: 100 weights, 3 tokens, 2 response rows."""
    small = ModelShape(1, 2, 0, 0, 0, 4, 10, 0, 100, 4)
    pair = Lengths(1, 1, 1)  # one token, twice
    forward = memory.precompute_flops(small, (), pair)
    assert forward == 2 * 100 * 2 + 2 * 2 * 2 * 10
    setup = replace(SETUP, first_adapted=0, last_adapted=0)
    assert memory.train_flops(small, (), setup, pair) == 2 * (2 * 100 * 2) + 2 * (2 * 2 * 2 * 10)
    assert memory.seconds(memory.EFFICIENCY * 3e9, 1.5) == pytest.approx(2.0)


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("mlx.core")
    root = tmp_path_factory.mktemp("plan")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "Well, so it is."}
    (root / "train.jsonl").write_text(json.dumps(row) + "\n")
    return root


def run(place, *words):
    from fpo_mlx.cli import main

    fixed = ["plan", "--model", place / "model", "--objective", "dpo", "--num-layers", "2"]
    return CliRunner().invoke(main, [str(word) for word in (*fixed, *words)])


def test_a_plan_says_what_fits_and_writes_it_down(place, tmp_path):
    result = run(
        place, "--data", place / "train.jsonl", "--memory-gb", 1, "--json", tmp_path / "p.json"
    )
    assert result.exit_code == 0, result.stderr
    assert "train: peak" in result.stdout
    assert "fits into 1.00 GB" in result.stdout
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["pairs"] == 1
    assert found["train"]["fits"] is found["precompute"]["fits"] is True
    assert sum(found["train"]["terms"].values()) == pytest.approx(
        found["train"]["peak_bytes"], abs=9
    )
    weights = sum(f.stat().st_size for f in (place / "model").glob("*.safetensors"))
    assert found["train"]["terms"]["model weights"] == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize("processes", [1, 2])
def test_no_more_pairs_are_planned_at_once_than_a_process_has_of_an_update(
    place, tmp_path, monkeypatch, processes
):
    def terms(micro):
        sizes = ("--batch-size", 2, "--grad-accumulation-steps", 2, "--micro-batch-size", micro)
        result = run(place, "--json", tmp_path / "p.json", "--overwrite", *sizes)
        assert result.exit_code == 0, result.stderr
        return json.loads((tmp_path / "p.json").read_text())["train"]["terms"]

    most = terms(4 // processes)
    if processes > 1:
        monkeypatch.setenv("MLX_RANK", "0")
        monkeypatch.setenv("MLX_WORLD_SIZE", str(processes))
    assert terms(8) == most


def test_an_adapter_that_training_starts_from_is_planned_with_its_own_rank_and_blocks(
    place, tmp_path
):
    """Adam holds five of each parameter: now, before, at the start, two moments."""
    from evaluated import adapter

    (tmp_path / "sft").mkdir()
    values = adapter(tmp_path / "sft", place / "model", 0)
    words = ["--data", place / "train.jsonl", "--json", tmp_path / "p.json"]
    result = run(place, *words, "--init-adapter", tmp_path / "sft")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "p.json").read_text())["train"]["terms"]
    assert found["adapters and optimizer"] == 5 * 4 * sum(one.size for one in values.values())


@pytest.mark.parametrize("outside", ["lm_head", "model.embed_tokens"])
def test_an_adapter_of_layers_outside_the_blocks_is_refused_before_anything_runs(
    place, tmp_path, outside
):
    """mlx_lm.lora takes such keys; no gradient reaches the head's own adapter here."""
    from command_line import run
    from evaluated import adapter

    (tmp_path / "sft").mkdir()
    adapter(tmp_path / "sft", place / "model", 0)
    config = json.loads((tmp_path / "sft/adapter_config.json").read_text())
    config["lora_parameters"]["keys"].append(outside)
    (tmp_path / "sft/adapter_config.json").write_text(json.dumps(config))
    words = ["--model", place / "model", "--data", place / "train.jsonl", "--objective", "dpo"]
    words += ["--init-adapter", tmp_path / "sft"]
    for command, more in (("plan", []), ("train", ["--adapter-path", tmp_path / "a"])):
        result = run(command, *words, *more)
        assert result.exit_code == 2, result.output
        assert f"sft adapts {outside}, which lies in no block" in result.stderr
        assert "fuse" in result.stderr
    assert not (tmp_path / "a").exists()


def test_a_plan_that_does_not_fit_says_what_to_change(place):
    result = run(place, "--memory-gb", 0.003, "--max-seq-length", 4096)
    assert result.exit_code == 0, result.stderr
    assert "DOES NOT FIT into 0.00 GB" in result.stdout
    assert "--grad-checkpoint --max-seq-length 1024 (cuts what is longer)" in result.stdout
    assert "nothing of this fits" in result.stdout
    assert "a pair of 4096 tokens is assumed" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--memory-gb", "0"), 2, "--memory-gb 0: wanted more than 0"),
        (("--memory-gb", "inf"), 2, "--memory-gb inf: wanted more than 0 and less than 1e+12"),
        (("--memory-gb", "nan"), 2, "--memory-gb nan: wanted more than 0"),
        (("--objective", "fpo"), 2, "--sae is missing"),
        (("--model", "/nowhere"), 1, "found no config.json"),
    ],
)
def test_bad_inputs_of_plan_are_one_plain_message(place, words, code, text):
    result = run(place, *words)
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Whose config.json has other names than everyone's."""
    from command_line import ROWS, lines, random_sae

    from fpo_mlx.sae.convert import write_saelens

    root = tmp_path_factory.mktemp("gpt2")
    tiny_models.tiny_gpt2(root / "model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "sae")
    lines(root / "data" / "train.jsonl", *ROWS)
    return root


@pytest.mark.parametrize("command", ["sae info", "plan", "precompute", "train"])
def test_gpt2_goes_through_every_command(gpt2, tmp_path, monkeypatch, command):
    from command_line import run, usual

    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    words = {
        "sae info": [gpt2 / "sae", "--model", gpt2 / "model"],
        "plan": [*usual(gpt2), "--top-k", 5],
        "precompute": [*usual(gpt2), "--output", tmp_path / "ref"],
        "train": [*usual(gpt2), "--top-k", 5, "--iters", 1, "--adapter-path", tmp_path / "a"],
    }[command]
    done = run(*command.split(), *words)
    assert done.exit_code == 0, done.stderr
    assert done.exception is None


ELSEWHERE = {  # families whose config.json has names of their own, in mlx-lm alone
    "openelm": {
        "vocab_size": 300, "head_dim": 12, "num_transformer_layers": 2, "model_dim": 48,
        "ffn_dim_divisor": 8,
        "num_query_heads": [2, 4], "num_kv_heads": [1, 2], "ffn_multipliers": [0.5, 4.0],
    },
    "afm7": {
        "vocab_size": 300, "hidden_dim": 48, "num_layers": 3, "num_kv_reuse_layers": 1,
        "num_heads": 4, "num_kv_heads": 2,
    },
    "phixtral": {
        "model_dim": 48, "num_layers": 2, "num_heads": 4, "rotary_dim": 8, "num_vocab": 300,
    },
}  # fmt: skip


def elsewhere(folder, family):
    """Such a model with random weights, beside a tokenizer."""
    import importlib

    mx = pytest.importorskip("mlx.core")
    from mlx.utils import tree_flatten
    from tiny_tokenizer import build_tiny_tokenizer

    config = {"model_type": family} | ELSEWHERE[family]
    code = importlib.import_module(f"mlx_lm.models.{family}")
    model = code.Model(code.ModelArgs.from_dict(config))
    build_tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


@pytest.mark.parametrize("family", list(ELSEWHERE))
def test_a_model_whose_config_has_other_names_is_planned_and_trained(tmp_path, monkeypatch, family):
    """Each of the three ended in KeyError: 'hidden_size'. mlx-lm's phixtral cannot be trained."""
    from command_line import ROWS, lines, random_sae, run, usual

    from fpo_mlx.model.load import load_model
    from fpo_mlx.pipeline.plan import shape_of
    from fpo_mlx.sae.convert import write_saelens
    from fpo_mlx.storage.hub import read_config

    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    elsewhere(tmp_path / "model", family)
    write_saelens(random_sae(48), tmp_path / "sae")
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    adapters = ["--adapter-path", tmp_path / "a", "--iters", 1]
    for command, words in (("plan", []), ("train", adapters)):
        if (command, family) != ("train", "phixtral"):
            done = run(command, *usual(tmp_path), "--top-k", 5, *words)
            assert done.exit_code == 0, done.output
    config = read_config(tmp_path / "model")
    shape = shape_of(load_model(tmp_path / "model").model, config, share_prompt=True)
    assert (shape.hidden, shape.heads, shape.head_dim) == (48, 4, 12)
    assert (shape.kv_heads, shape.vocab) == (4 if family == "phixtral" else 2, 300)


def test_a_config_without_a_width_is_a_plain_error_that_names_it():
    from fpo_mlx.errors import ModelError
    from fpo_mlx.storage.hub import size_in, todays_names

    with pytest.raises(ModelError, match="odd.* says no hidden_size, wanted hidden_size or n_embd"):
        size_in({"model_type": "odd"}, "hidden_size")
    mamba = {"hidden_size": 64, "num_heads": 8}
    assert todays_names(mamba) == mamba
    assert todays_names({"n_embd": 8, "hidden_size": None})["hidden_size"] == 8


def test_what_a_published_config_leaves_out_is_the_models_own_default(tmp_path):
    """Gemma 3's has neither the vocabulary nor the heads, on either level."""
    from fpo_mlx.model.load import load_model
    from fpo_mlx.pipeline.plan import shape_of
    from fpo_mlx.storage.hub import read_config

    folder = tiny_models.tiny_gemma3(tmp_path / "model")
    model, whole = load_model(folder).model, read_config(folder)
    wanted = shape_of(model, whole, share_prompt=True)
    left_out = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = {k: v for k, v in whole.items() if k not in left_out}
    assert shape_of(model, config, share_prompt=True) == wanted


def test_windows_and_a_forward_gradient_are_counted():
    model, setup, pair = replace(MODEL, fused_attention=True), SETUP, Lengths(64, 96, 96)

    def peak(model, setup):
        return memory.total(memory.train_terms(model, (), setup, TILES, pair))

    assert peak(replace(model, window=512), setup) == peak(model, setup)
    assert peak(replace(model, window=100), setup) > peak(model, setup)
    pair = Lengths(256, 92, 71)  # as measured by scripts/bench/forward.py
    forward = peak(model, replace(setup, forward=True))
    assert forward < peak(model, replace(setup, grad_checkpoint=True))
