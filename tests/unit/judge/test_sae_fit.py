"""How well an SAE reads a model: figures by hand, splices in a model, verdicts, the command."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from command_line import lines, run
from evaluated import adapter as write_adapter
from helpers import random_pairs, random_sae
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_saes import CASES

from fpo_mlx.errors import ModelError, SaeError
from fpo_mlx.judge import sae_fit
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.records import SITE_KINDS, Passage, SaeWeights, Site
from fpo_mlx.sae import fit, load_sae
from fpo_mlx.sae.convert import write_saelens
from fpo_mlx.sae.encode import decode, encode

WIDTH = tiny_models.HIDDEN


def exact_sae(site: Site, width: int = WIDTH) -> SaeWeights:
    """Gives back its input: a positive and a negative feature for every coordinate."""
    eye = np.eye(width, dtype=np.float32)
    w_enc = np.concatenate([eye, -eye], axis=1)  # [D, 2D]
    zeros = np.zeros(width, np.float32)
    return SaeWeights(
        "relu", w_enc, np.zeros(2 * width, np.float32), w_dec=w_enc.T.copy(), b_dec=zeros, site=site
    )


def passages(n: int = 3) -> list[Passage]:
    rng = np.random.default_rng(0)
    draw = [rng.integers(3, 300, size).astype(np.int32) for size in (5, 7, 2, 4, 1, 6)]
    return [Passage(draw[2 * i], draw[2 * i + 1]) for i in range(n)]


def likely_passages(policy: Policy, n: int = 3) -> list[Passage]:
    """Answers that the model itself finds likeliest, so that an ablation does harm."""
    found = []
    for passage in passages(n):
        answer: list[int] = []
        for _ in passage.response:
            rows = policy.answer_rows(passage.prompt, np.array([*answer, 0], np.int32))
            answer.append(int(mx.argmax(policy.head(rows.hidden)[-1])))
        found.append(Passage(passage.prompt, np.array(answer, np.int32)))
    return found


def policy_of(folder, *sites: Site) -> Policy:
    loaded = load_model(folder)
    return Policy(loaded.model, loaded.config, sites, share_prompt=False)


# --- figures -----------------------------------------------------------------------------------
def test_the_figures_by_hand():
    # one feature reads the first coordinate above 1; features 1 and 2 never fire
    w_enc = np.zeros((2, 3), np.float32)
    w_enc[0, 0] = 1
    sae = SaeWeights(
        "jumprelu", w_enc, np.zeros(3, np.float32), threshold=np.ones(3, np.float32),
        w_dec=np.array([[0.5, 0], [0, 0], [0, 0]], np.float32), b_dec=np.zeros(2, np.float32),
    )  # fmt: skip
    x = np.array([[4, 0], [0, 2], [2, 4], [2, 2]], np.float32)
    # r = [2, 0], [0, 0], [1, 0], [1, 0]: errors 4, 4, 17, 5; mean(x) = (2, 2), variance 8 + 8
    found = fit.figures(fit.measure(sae, x))
    assert found.tokens == 4
    assert found.l0 == 0.75
    assert found.dead == pytest.approx(2 / 3)
    assert found.fvu == pytest.approx(30 / 16)
    # cov(x, r) = 2 * 1 + (-2) * (-1) = 4, var(r) = 1 + 1 = 2
    assert found.gain == pytest.approx(2)


@settings(max_examples=25)
@given(cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_sums_of_parts_are_the_sums_of_the_whole(cut: int, seed: int):
    sae = replace(
        random_sae("topk", 8, Site(0)), w_dec=np.ones((48, 8), np.float32), b_dec=np.ones(8, "f4")
    )
    x = np.random.default_rng(seed).normal(size=(41, 8)).astype(np.float32)
    cut = max(1, cut)
    parts = fit.figures(fit.measure(sae, x[:cut]) + fit.measure(sae, x[cut:]))
    whole = fit.figures(fit.measure(sae, x))
    assert (parts.tokens, parts.l0, parts.dead) == (41, whole.l0, whole.dead)
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert parts.gain == pytest.approx(whole.gain, rel=1e-6)


def test_rows_in_small_pieces_change_nothing(monkeypatch):
    sae, x = exact_sae(Site(0), 6), np.random.default_rng(1).normal(size=(50, 6)).astype("f4")
    whole = fit.figures(fit.measure(sae, x))
    monkeypatch.setattr(fit, "_ELEMENTS", 100)
    pieces = fit.figures(fit.measure(sae, x))
    assert pieces.l0 == whole.l0
    assert whole.fvu == pytest.approx(0, abs=1e-12)


def test_fvu_is_torchs_of_the_same_arrays():
    torch = pytest.importorskip("torch")
    sae = replace(exact_sae(Site(0), 8), w_dec=np.eye(16, 8, dtype=np.float32) * 0.7)
    x = np.random.default_rng(2).normal(size=(30, 8)).astype(np.float32) + 5
    t, r = torch.tensor(x).double(), torch.tensor(decode(sae, encode(sae, x), x)).double()
    wanted = (t - r).pow(2).sum() / (t.var(dim=0, unbiased=False).sum() * len(t))
    assert fit.figures(fit.measure(sae, x)).fvu == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_family_is_measured_or_says_why_not(case, tmp_path):
    made = case.make(tmp_path, np.random.default_rng(0))
    sae = load_sae(made.path, allow_pickle=case.pickled, **made.options)
    x = np.random.default_rng(1).normal(size=(20, sae.d_in)).astype(np.float32)
    found = fit.figures(fit.measure(sae, x), fit.reconstructs(sae))
    acts = made.encode(x.astype(np.float64))
    assert found.l0 == pytest.approx((acts != 0).sum() / 20, abs=0.051)  # one rounded at its gate
    if sae.transcoder:
        assert (found.fvu, "another place" in found.why_not) == (None, True)
    else:
        recon = decode(sae, encode(sae, x), x)
        wanted = ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        assert found.fvu == pytest.approx(wanted, rel=1e-4)


def test_an_sae_of_a_centred_stream_gives_the_mean_back(tmp_path):
    case = next(case for case in CASES if case.name == "saelens_centred")
    sae = load_sae(case.make(tmp_path, np.random.default_rng(0)).path)
    x = np.random.default_rng(1).normal(size=(5, sae.d_in)).astype(np.float32)
    moved = x + np.arange(5, dtype=np.float32)[:, None]
    before, after = (decode(sae, encode(sae, rows), rows) for rows in (x, moved))
    np.testing.assert_allclose(after - before, moved - x, atol=1e-4)


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(SaeError, match="not all finite"):
        fit.measure(exact_sae(Site(0), 2), np.array([[1, np.nan]], np.float32))


# --- splicing ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", SITE_KINDS)
@pytest.mark.parametrize("maker", ["tiny_llama", "tiny_gemma2", "tiny_granite"])
def test_what_is_spliced_is_what_the_model_goes_on_with(maker, kind, tmp_path):
    """Its own rows change nothing; other rows change the answer's logits, and are recorded."""
    policy = policy_of(getattr(tiny_models, maker)(tmp_path), Site(1, kind))
    passage = passages()[0]
    plain = policy.answer_rows(passage.prompt, passage.response)
    if kind in ("resid_mid", "mlp_in_unscaled"):
        with pytest.raises(ModelError, match="more than one way"):
            policy.answer_rows(passage.prompt, passage.response, lambda rows: rows)
        return
    seen = []
    same = policy.answer_rows(
        passage.prompt, passage.response, lambda rows: seen.append(rows) or rows
    )
    np.testing.assert_allclose(same.hidden, plain.hidden, atol=1e-4)
    np.testing.assert_allclose(seen[0], plain.tapped[0], atol=1e-5)
    other = policy.answer_rows(passage.prompt, passage.response, sae_fit.constant(np.ones(
        plain.tapped[0].shape[1], np.float32)))  # fmt: skip
    np.testing.assert_allclose(other.tapped[0], np.ones(plain.tapped[0].shape), atol=1e-5)
    assert np.abs(np.array(other.hidden) - np.array(plain.hidden)).max() > 0.01
    after = policy.answer_rows(passage.prompt, passage.response)  # and it is over
    np.testing.assert_array_equal(after.hidden, plain.hidden)


def test_splicing_the_last_block_equals_torchs_model_with_a_hook(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, passage = tiny_models.tiny_llama(tmp_path), passages()[0]
    policy = policy_of(folder, Site(2, "mlp_out"))
    put = sae_fit.constant(np.linspace(-1, 1, WIDTH, dtype=np.float32))
    found = sae_fit._run(policy, passage, put)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first, tokens = len(passage.prompt) - 1, np.concatenate([passage.prompt, passage.response])

    def hook(module, args, out):
        out = out.clone()
        out[:, first:] = torch.linspace(-1, 1, WIDTH)
        return out

    model.model.layers[2].mlp.register_forward_hook(hook)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[None, :-1].astype(np.int64))).logits[0, first:]
    wanted = logits.double().log_softmax(-1)
    wanted = wanted[torch.arange(len(passage.response)), torch.tensor(passage.response).long()]
    assert found == pytest.approx(float(wanted.sum()), abs=1e-4)


def test_an_exact_sae_recovers_all_of_the_loss_and_nothing_is_wrong_with_it(tmp_path):
    policy = policy_of(tiny_models.tiny_llama(tmp_path), Site(2))
    told = []
    answers = likely_passages(policy)
    report = sae_fit.evaluate(
        policy, exact_sae(Site(2)), answers, progress=lambda *step: told.append(step)
    )
    assert report.loss is not None
    assert report.loss.clean == pytest.approx(report.loss.spliced, abs=1e-5)
    assert report.loss.recovered == pytest.approx(1, abs=1e-4)
    assert report.figures.fvu == pytest.approx(0, abs=1e-9)
    assert report.figures.tokens == 7 + 4 + 6
    assert report.warnings == ()
    assert (told[0], told[-1]) == ((1, 9), (9, 9))
    alone = sae_fit.evaluate(policy, exact_sae(Site(2)), answers, ablation="mean")
    assert alone.loss is not None
    assert alone.loss.ablated != report.loss.ablated


def test_an_sae_without_a_use_recovers_what_zeros_do(tmp_path):
    policy = policy_of(tiny_models.tiny_llama(tmp_path), Site(2))
    mute = replace(exact_sae(Site(2)), w_dec=np.zeros((2 * WIDTH, WIDTH), np.float32))
    report = sae_fit.evaluate(policy, mute, passages())
    assert report.loss is not None
    assert report.loss.spliced == pytest.approx(report.loss.ablated, abs=1e-6)


def test_a_transcoder_gets_its_counts_and_the_reason_for_the_rest(tmp_path):
    policy = policy_of(tiny_models.tiny_llama(tmp_path), Site(2, "mlp_in"))
    sae = replace(exact_sae(Site(2, "mlp_in")), transcoder=True)
    report = sae_fit.evaluate(policy, sae, passages())
    shown = report.as_dict()
    assert shown["l0"] == WIDTH  # of each coordinate's two features one is active
    assert (shown["fvu"], report.loss) == (None, None)
    assert "predicts another place" in shown["no_loss"]


def test_the_place_that_the_sae_reads_better_is_named(tmp_path):
    """An SAE whose decoder spans what the tokens have after block 1, used after block 2."""
    folder = tiny_models.tiny_llama(tmp_path)
    here, there = Site(2), Site(1)
    rows = [sae_fit._run(policy_of(folder, there), p, None)[1][0] for p in passages()]
    x = np.concatenate(rows)  # [17, D], fewer rows than coordinates: their span is the SAE
    base = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:16]
    w_enc = np.concatenate([base.T, -base.T], axis=1).astype(np.float32)
    sae = SaeWeights(
        "relu", w_enc, np.zeros(32, np.float32), b_in=x.mean(0), w_dec=w_enc.T.copy(),
        b_dec=x.mean(0), site=here,
    )  # fmt: skip
    loaded = load_model(folder)
    places = sae_fit.places_to_compare(loaded.model, here)
    assert places == (Site(1), Site(3), Site(2, "mlp_out"), Site(2, "attn_out"))
    policy = Policy(loaded.model, loaded.config, (here, *places), share_prompt=False)
    report = sae_fit.evaluate(policy, sae, passages())
    assert report.elsewhere["resid_post of block 1"] < 1e-6
    assert any("reads the resid_post of block 1 better" in text for text in report.warnings)


def test_places_of_another_width_are_not_compared_with(tmp_path):
    """Heads of Gemma 4 are larger where it attends to all that came before."""
    model = load_model(tiny_models.tiny_gemma4_text(tmp_path)).model
    assert sae_fit.places_to_compare(model, Site(1, "attn_z")) == ()
    assert sae_fit.places_to_compare(model, Site(1)) == (
        Site(0), Site(2), Site(1, "mlp_out"), Site(1, "attn_out"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["resid_mid", "mlp_in_unscaled"])
def test_where_nothing_can_be_spliced_the_neighbours_figures_are_shown(tmp_path, kind):
    here = Site(1, kind)
    loaded = load_model(tiny_models.tiny_llama(tmp_path))
    places = sae_fit.places_to_compare(loaded.model, here)
    policy = Policy(loaded.model, loaded.config, (here, *places), share_prompt=False)
    shown = sae_fit.evaluate(policy, exact_sae(here, WIDTH), passages()).as_dict()
    assert "more than one way" in shown["no_loss"]
    assert {f"fvu at {kind} of block 0", f"fvu at {kind} of block 2"} <= shown.keys()


# --- verdicts ----------------------------------------------------------------------------------
GOOD = fit.FitFigures(tokens=10_000, l0=32.9, dead=0.01, fvu=0.42, gain=0.81)
FAULTS = [
    ({"fvu": 3.9}, "FVU is 3.9: the reconstruction is worse than the mean"),
    ({"fvu": 0.95}, "FVU is 0.95: the reconstruction is about the mean"),
    ({"fvu": 0.61}, "FVU is 0.610, above 0.6"),
    ({"l0": 32 * 1.41}, "L0 is 45.1, its files say 32"),
    ({"l0": 32 / 1.41}, "L0 is 22.7, its files say 32"),
    ({"gain": 0.5}, "varies 2.0 times too large"),
    ({"gain": 1.5}, "varies off by 1.50"),
    ({"gain": -0.1}, "varies off by -0.10"),
    ({"dead": 0.51}, "51% of the features are never active"),
]


@pytest.mark.parametrize(("change", "text"), FAULTS)
def test_each_figure_is_called_out_by_itself(change, text):
    found = fit.verdict(replace(GOOD, **change), features=4096, stated_l0=32)
    assert len(found) == 1
    assert text in found[0]


MEASURED = [  # (fvu, gain, l0, dead) on SmolLM2, right and wrong
    ((0.356, 0.985, 32.0, 0.002), True),
    ((0.426, 0.978, 32.0, 0.000), True),
    ((0.445, 0.829, 32.9, 0.001), True),
    ((0.509, 0.810, 34.3, 0.000), True),
    ((0.728, 0.759, 21.7, 0.021), False),  # block 26, JumpReLU
    ((0.692, 0.739, 23.6, 0.073), False),
    ((0.709, 0.612, 75.4, 0.000), False),  # block 28, JumpReLU
    ((3.98, 0.276, 32.0, 0.886), False),  # the MLP's output
    ((8.11, 0.255, 91.3, 0.699), False),
    ((0.955, 0.759, 32.0, 0.452), False),  # half the scale
    ((1.59, 0.714, 7.98, 0.662), False),
    ((5.85, 0.326, 531.0, 0.000), False),  # twice the scale
]


@pytest.mark.parametrize(("values", "right"), MEASURED)
def test_the_thresholds_part_what_was_measured(values, right):
    fvu, gain, l0, dead = values
    figures = fit.FitFigures(6516, l0, dead, fvu, gain)
    assert (fit.verdict(figures, features=4096, stated_l0=32) == ()) is right


def test_a_topk_sae_one_block_off_is_known_by_the_better_place():
    # FVU 0.499 and 0.356 on the same tokens: no figure alone is out of bounds
    off = fit.FitFigures(2966, 32.0, 0.055, 0.499, 0.950)
    assert fit.verdict(off, features=4096, stated_l0=32) == ()
    places = {"resid_post of block 27": (0.356, 0.499), "resid_post of block 25": (0.6, 0.499)}
    (text,) = fit.verdict(off, features=4096, stated_l0=32, elsewhere=places)
    assert "resid_post of block 27 better (FVU 0.356 there, 0.499 here)" in text


def test_few_tokens_say_nothing_of_dead_features_and_a_low_recovery_is_said():
    few = replace(GOOD, tokens=100, dead=0.9)
    assert fit.verdict(few, features=4096, stated_l0=32) == ()
    (text,) = fit.verdict(GOOD, features=4096, recovered=0.79)
    assert "Loss recovered is 0.79" in text


def test_the_stated_l0_is_k_or_stands_in_the_path():
    sae = exact_sae(Site(0), 2)
    assert fit.stated_l0(sae) is None
    assert fit.stated_l0(replace(sae, k=8)) == 8
    assert fit.stated_l0(replace(sae, source="/a/layer_27/width_4k/average_l0_32")) == 32


# --- the command -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("sae_fit")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    write_saelens(exact_sae(Site(1)), root / "sae")
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes, hello."}]
    lines(root / "chats.jsonl", *[{"messages": turns}] * 3)
    # untrained weights do better on some texts when they are ablated; not on this one
    lines(root / "texts.jsonl", *[{"text": "abc abc abc abc"}] * 3)
    lines(root / "pairs" / "train.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c d"})
    lines(root / "pairs" / "valid.jsonl", {"prompt": "a?", "chosen": "bee", "rejected": "c d e"})
    return root


def fitted(root, *words: object):
    flags = {"--model": root / "model", "--sae": root / "sae"}
    return run("sae", "evaluate", *(w for flag in flags.items() for w in flag), *words)


@pytest.mark.parametrize(
    ("source", "answers"), [("chats.jsonl", 3), ("texts.jsonl", 3), ("pairs", 2)]
)
def test_the_command_takes_chats_texts_and_pairs(place, tmp_path, source, answers):
    done = fitted(place, "--data", place / source, "--json", tmp_path / "fit.json")
    assert done.exit_code == 0, done.stderr
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["answers"] == answers
    assert found["fvu"] == pytest.approx(0, abs=1e-6)
    assert found["loss_recovered"] == pytest.approx(1, abs=1e-3)
    assert found["warnings"] == []
    assert "loss_recovered" in done.stdout
    assert "warning" not in done.stderr


def test_without_data_the_demos_pairs_are_used(place):
    done = fitted(place, "--sequences", 3)
    assert done.exit_code == 0, done.stderr
    assert ["answers", "3"] in [line.split() for line in done.stdout.splitlines()]


def test_another_place_is_called_out(place):
    done = fitted(place, "--data", place / "chats.jsonl", "--layer", 2)
    assert done.exit_code == 0, done.stderr
    assert "warning: The SAE was trained on resid_post of block 1" in done.stderr


def test_an_adapter_of_another_model_is_called_out(place, tmp_path):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, place / "model", seed=3)
    about = json.loads((adapter / "adapter_config.json").read_text())
    lines(adapter / "adapter_config.json", about | {"model": "owner/another"})
    done = fitted(place, "--data", place / "texts.jsonl", "--adapter-path", adapter)
    assert done.exit_code == 0, done.stderr
    assert f"warning: the adapter {adapter} was made for another model" in done.stderr


BAD = [
    (["--layer", "9"], 1, "the model has blocks 0 to 3"),
    (["--site", "nowhere"], 1, "site 'nowhere' is unknown"),
    (["--sae-k", "0"], 2, "--sae-k 0: wanted more than 0"),
    (["--sae-k", "4"], 1, "a relu SAE, which has no k"),
    (["--sae", "x"], 2, "--sae: found 2, wanted exactly one"),
    (["--sequences", "0"], 2, "--sequences"),
    (["--max-seq-length", "2"], 3, "fits into 2 tokens"),
    (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
]


@pytest.mark.parametrize(("words", "code", "text"), BAD)
def test_a_bad_call_ends_in_one_plain_message(place, tmp_path, words, code, text):
    given = [] if "--data" in words else ["--data", place / "chats.jsonl"]
    done = fitted(place, *given, *words, "--json", tmp_path / "fit.json")
    assert (done.exit_code, text in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "messages is an empty list"),
        ({"text": 3}, "text is a number, wanted a text"),
        ({"prompt": "a"}, "chosen"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
    ],
)
def test_a_row_that_is_no_text_is_named(place, tmp_path, row, reason):
    lines(tmp_path / "rows.jsonl", row)
    done = fitted(place, "--data", tmp_path / "rows.jsonl")
    assert done.exit_code == 3, done.stderr
    assert "rows.jsonl:1: " in done.stderr
    assert reason in done.stderr


# --- the look before a reference pass ------------------------------------------------------------
def precomputed(root, out, *words: object):
    flags = {"--model": root / "model", "--data": root / "pairs", "--output": out}
    return run("precompute", *(w for flag in flags.items() for w in flag), *words)


def test_precompute_says_how_the_sae_reads_and_is_silent_when_nothing_is_to_do(place, tmp_path):
    words = ("--sae", place / "sae")
    done = precomputed(place, tmp_path / "ref", *words)
    assert done.exit_code == 0, done.stderr
    assert f"{place / 'sae'}: L0 {WIDTH}.0, FVU " in done.stderr
    assert "warning" not in done.stderr
    assert "FVU" not in precomputed(place, tmp_path / "ref", *words).stderr
    assert "FVU" not in precomputed(place, tmp_path / "r2", *words, "--no-check-sae").stderr


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_precompute_warns_of_an_sae_that_reads_nothing(place, tmp_path, backend):
    if backend == "torch":
        pytest.importorskip("torch")
    blind = replace(exact_sae(Site(1)), w_dec=-exact_sae(Site(1)).w_enc.T.copy())
    write_saelens(blind, tmp_path / "blind")
    words = ("--sae", place / "sae", "--sae", tmp_path / "blind", "--backend", backend)
    done = precomputed(place, tmp_path / "ref", *words)
    assert done.exit_code == 0, done.stderr
    assert f"warning: {tmp_path / 'blind'}: FVU is " in done.stderr
    assert "worse than the mean" in done.stderr
    assert f"warning: {place / 'sae'}" not in done.stderr


def test_both_backends_see_the_same_activations(place):
    pytest.importorskip("torch")
    from fpo_mlx.reference import open_backend

    saes = [exact_sae(Site(1)), exact_sae(Site(2, "mlp_out"))]
    pairs = random_pairs([(4, 7, 3), (1, 4, 4)])
    mlx, torch = (
        open_backend(name, model_path=place / "model", saes=saes).activations(pairs)
        for name in ("mlx", "torch")
    )
    for a, b in zip(mlx, torch, strict=True):
        assert a.shape == (7 + 3 + 4 + 4, WIDTH)
        a, b = (rows[np.lexsort(rows.T)] for rows in (a, b))  # each backend has its own order
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_look_is_bounded():
    from fpo_mlx.pipeline.sae_fit import beginnings

    pairs = random_pairs([(n, 300, 10) for n in range(1, 101)])
    few = beginnings(pairs)
    assert len(few) == 16
    assert max(len(pair.prompt) for pair in few) == 50  # of the shorter half
    assert {len(pair.chosen) for pair in few} == {64}
    assert {len(pair.rejected) for pair in few} == {10}
    assert len(beginnings(pairs[:3])) == 3


@pytest.mark.parametrize("kind", ["pairs", "chats", "a few long prompts"])
def test_passages_are_spread_over_the_whole_data(place, kind):
    from fpo_mlx.data import read_passages
    from fpo_mlx.data.read import RawRow
    from fpo_mlx.data.tokenizer import load_tokenizer

    def record(n: int) -> dict:
        if kind == "chats":
            return {"messages": [{"role": "user", "content": f"Say {n}, please."}]}
        long = kind == "a few long prompts" and n % 3 == 0
        return {"prompt": "Q? " * (200 if long else 1), "chosen": f"Yes {n}.", "rejected": "No."}

    alive, most = weakref.WeakValueDictionary(), 0

    def read():
        nonlocal most
        for n in range(1000):
            yield alive.setdefault(n, RawRow(record(n), f"{n}", n))
            most = max(most, len(alive))

    found = read_passages(read, load_tokenizer(place / "model"), 40, 128)
    assert most < 70  # rows in memory at once: never all
    assert len(found) == 40
    seen = [int(p.where) for p in found]
    assert seen == sorted(seen)
    assert max(np.diff([0, *seen, 1000])) < 80


HI = {"from": "human", "value": "Hello."}


@pytest.mark.parametrize(
    ("record", "same"),
    [
        ({"conversations": [HI]}, {"messages": [{"role": "user", "content": "Hello."}]}),
        ({"conversation": str([HI]), "messages": None}, {"conversations": [HI]}),
        ({"content": "Paris is large."}, {"text": "Paris is large."}),
        ({"messages": [], "text": "Paris is large."}, {"text": "Paris is large."}),
    ],
)
def test_a_chat_or_a_text_is_what_sae_train_takes_for_one(place, tmp_path, record, same):
    from fpo_mlx.data import read_passages
    from fpo_mlx.data.read import RawRow
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.saetrain.texts import read_documents

    tokenizer = load_tokenizer(place / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (document,) = read_documents(str(tmp_path / "a.jsonl"), tokenizer, max_length=64).items
    for one in (record, same):
        rows = (RawRow(one, "a.jsonl:1", 0),)
        (found,) = read_passages(rows.__iter__, tokenizer, 1, 64)
        assert [*found.prompt, *found.response] == document.tokens.tolist()


@pytest.mark.parametrize("longest", [128, 4])
def test_a_plain_text_is_judged_behind_the_bos_from_its_first_token_on(place, longest):
    from fpo_mlx.data import read_passages
    from fpo_mlx.data.read import RawRow
    from fpo_mlx.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(place / "model")
    rows = [RawRow({"text": "Paris is large."}, "a.jsonl:1", 0)]
    (found,) = read_passages(lambda: rows, tokenizer, 1, longest)
    text = tokenizer.text_tokens("Paris is large.")
    wanted = [tokenizer.raw.bos_token_id, *text][:longest]
    assert [*found.prompt, *found.response] == wanted
    assert found.prompt.tolist() == wanted[:2]  # the position before the response is the first seen


def test_vectors_by_heads_are_encoded_side_by_side(place, tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 4, WIDTH // 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    flags = ("--input", tmp_path / "x.npy", "--output", tmp_path / "acts.npy")
    done = run("sae", "encode", "--sae", place / "sae", *flags)
    assert done.exit_code == 0, done.stderr
    wanted = encode(exact_sae(Site(1)), x.reshape(3, WIDTH))
    np.testing.assert_array_equal(np.load(tmp_path / "acts.npy"), wanted)


def test_the_fixture_check_calls_out_what_is_wrong(tmp_path, monkeypatch):
    """Its own judgement: equal, off, refused for the right and for another reason."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "scripts"))
    import fixtures as check

    wanted = np.array([[4.0, 0.0]])
    assert check.compared("f", "n", wanted * (1 + 9e-6), wanted).good
    assert not check.compared("f", "n", wanted * (1 + 2e-5), wanted).good
    assert not check.compared("f", "n", "a message", wanted).good
    assert check.refused("f", "n", "it is a pickle", "pickle").good
    assert not check.refused("f", "n", "something else", "pickle").good
    assert not check.refused("f", "n", wanted, "pickle").good
    assert {line.good for line in check.fresh(3)} == {True}
