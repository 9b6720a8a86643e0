"""`fpo-mlx sae train`, start to finish on a tiny model: what it writes, and what it refuses."""

from __future__ import annotations

import json
import signal
import sys
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner

mx = pytest.importorskip("mlx.core")

from fpo_mlx.cli import main  # noqa: E402
from fpo_mlx.config import SaeTrainConfig, load_section  # noqa: E402
from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.errors import FpoError  # noqa: E402
from fpo_mlx.judge import sae_fit  # noqa: E402
from fpo_mlx.judge.sae_fit import LossFigures  # noqa: E402
from fpo_mlx.machine import device  # noqa: E402
from fpo_mlx.machine.parallel import Ranks  # noqa: E402
from fpo_mlx.model import open as model_open  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402
from fpo_mlx.model.policy import Policy  # noqa: E402
from fpo_mlx.pipeline import sae_finish, sae_setup  # noqa: E402
from fpo_mlx.records import SaeWeights, Site, TokenPair  # noqa: E402
from fpo_mlx.sae import load_sae  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402
from fpo_mlx.saetrain import activations, finish, state, texts  # noqa: E402
from fpo_mlx.saetrain.sizes import learning_rate, sizes, steps_in_time  # noqa: E402
from fpo_mlx.storage import locks, publish  # noqa: E402

TEXTS = [
    f"{'abcdefghijklmnopqrstuvwxyz'[i % 26]} poem {i * i} of the sea, the rain and star {i % 7}."
    for i in range(120)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"{t}?"}, {"role": "assistant", "content": t}]}
    for t in TEXTS[:20]
]
PAIRS = [{"prompt": f"{t}?", "chosen": f"Yes, {t}", "rejected": "No."} for t in TEXTS[:20]]
SIGNALS = "fpo_mlx.cli.sae_train.on_signal_within"
QUICK = ("--training-tokens", 2560, "--batch-size", 64, "--width", 64, "--k", 6)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(llama):
    return load_tokenizer(llama)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def run(*words):
    return CliRunner().invoke(main, ["sae", "train", *map(str, words)])


def test_training_keeps_its_share_wired_and_only_while_it_trains(
    llama, corpus, tmp_path, monkeypatch
):
    """What the share does is device.resident's, tested there."""
    seen = []

    @contextmanager
    def resident(share, processes):
        assert processes == 1
        seen.append(share)
        yield
        seen.append("given back")

    monkeypatch.setattr(device, "resident", resident)
    base = ("--model", llama, "--data", corpus, *QUICK)
    assert run(*base, "--output", tmp_path / "a").exit_code == 0
    assert run(*base, "--output", tmp_path / "b", "--wired-share", 0).exit_code == 0
    assert seen == [0.75, "given back", 0.0, "given back"]
    refused = run(*base, "--output", tmp_path / "c", "--wired-share", 1.5)
    assert refused.exit_code == 2
    assert "--wired-share 1.5: wanted 0 to 1" in refused.output


def test_one_command_makes_an_sae_that_reads_its_model(llama, corpus, tmp_path):
    out = tmp_path / "my-sae"
    done = run("--model", llama, "--data", corpus, "--output", out, *QUICK,
               "--json", tmp_path / "figures.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    sae, figures = load_sae(out), json.loads((tmp_path / "figures.json").read_text())
    assert (sae.activation, sae.k, sae.n_features, sae.d_in) == ("topk", 6, 64, 32)
    assert sae.site == Site(2)  # block 2 of 4
    assert figures["l0"] == 6
    assert 0 < figures["fvu"] < 0.8
    card = (out / "README.md").read_text()
    assert f"| fraction of variance unexplained | {figures['fvu']:.4f} |" in card
    assert figures["loss_recovered"] is None  # zeros do a random model no harm
    assert "loss recovered" not in card
    assert "| tokens trained on | 2560 |" in card
    assert card.startswith("---\nlibrary_name: saelens\n")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert lines[-1]["loss"] < lines[0]["loss"]
    info = CliRunner().invoke(main, ["sae", "info", str(out), "--model", str(llama)])
    assert info.exit_code == 0, info.output
    assert not list(out.glob("export*"))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_one_threshold_is_of_the_random_rows_that_the_start_is_of(
    llama, corpus, tmp_path, monkeypatch, architecture
):
    """The head of a sorted file is one kind of text. A TopK SAE has no threshold."""
    seen, fresh, finished = {}, state.fresh, finish.finished
    monkeypatch.setattr(
        state, "fresh", lambda rows, *a, **k: fresh(seen.setdefault("start", rows), *a, **k)
    )
    monkeypatch.setattr(
        finish, "finished", lambda *a, **k: seen.update(end=a[2]) or finished(*a, **k)
    )
    monkeypatch.setattr(sys.modules["fpo_mlx.pipeline.sae_train"], "START_ROWS", 64)
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", tmp_path / "o")
    done = run(*words, "--architecture", architecture)
    assert done.exit_code == 0, done.output
    if architecture == "topk":
        assert seen["end"] is None
    else:
        np.testing.assert_array_equal(seen["end"], seen["start"])


def test_the_card_says_what_of_the_loss_is_recovered(llama, corpus, tmp_path, monkeypatch):
    seen = {}

    def evaluate(policy, sae, passages):
        seen.update(site=policy.sites, passages=passages)
        return SimpleNamespace(loss=LossFigures(2.0, 2.5, 7.0, "zero"))

    monkeypatch.setattr("fpo_mlx.judge.sae_fit.evaluate", evaluate)
    out = tmp_path / "my-sae"
    done = run("--model", llama, "--data", corpus, "--output", out, *QUICK, "--json",
               tmp_path / "figures.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (
        "| loss recovered, against zeros at the site | 0.9000 |" in (out / "README.md").read_text()
    )
    assert json.loads((tmp_path / "figures.json").read_text())["loss_recovered"] == 0.9
    assert list(seen["site"]) == [Site(2)]
    assert all(len(one.prompt) == 1 and len(one.response) > 1 for one in seen["passages"])


def test_the_sae_is_on_the_disk_and_its_model_let_go_before_a_whole_model_is_opened(
    llama, corpus, tmp_path, monkeypatch
):
    out, opened = tmp_path / "my-sae", []
    real = model_open.open_model

    def open_model(spec, **options):
        assert not [one for one, _ in opened if one() is not None]
        assert not opened or load_sae(out).n_features == 64
        loaded = real(spec, **options)
        opened.append((weakref.ref(loaded.model.model), spec))  # the reader keeps its backbone
        return loaded

    monkeypatch.setattr(model_open, "open_model", open_model)
    done = run("--model", llama, "--data", corpus, "--output", out, *QUICK)
    assert done.exit_code == 0, done.output
    assert [spec for _, spec in opened] == [llama.resolve()] * 2  # a hub id is resolved once
    assert "held-out rows" in (out / "README.md").read_text()


def test_a_pinned_model_is_published_by_its_name_alone(llama, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sae_setup, "resolve_model", lambda spec: llama)
    words = ("--model", "owner/tiny@refs/pr/3", "--data", corpus, "--output", tmp_path / "o")
    done = run(*words, *QUICK)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "o/cfg.json").read_text())["metadata"]["model_name"] == "tiny"
    card = (tmp_path / "o/README.md").read_text()
    assert "base_model: owner/tiny\n" in card
    assert "| model | owner/tiny |" in card
    assert load_sae(tmp_path / "o").model_name == "tiny"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_a_resumed_command_ends_with_the_same_bytes(llama, corpus, tmp_path, architecture):
    words = ("--model", llama, "--data", corpus, *QUICK, "--architecture", architecture,
             "--matryoshka", "--memory-gb", 1e-4, "--save-every", 10)  # fmt: skip
    outs = [tmp_path / name for name in ("straight", "cut")]
    assert run(*words, "--output", outs[0]).exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        asked = iter(range(1, 1000))
        patch.setattr(SIGNALS, lambda: nullcontext(lambda: lambda: 143 * (next(asked) > 16)))
        stopped = run(*words, "--output", outs[1])
    assert stopped.exit_code == 143
    assert "go on with --resume" in stopped.output
    assert not (outs[1] / "cfg.json").exists()
    done = run(*words, "--output", outs[1], "--resume")
    assert done.exit_code == 0, done.output
    assert "resumed after step 17" in done.output
    for name in (finish.WEIGHTS, finish.CONFIG):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    other = run(*words, "--output", outs[1], "--resume", "--seed", 1)
    assert other.exit_code == 2
    assert "seed: was 0, now 1" in other.output


def test_a_run_starts_from_an_sae_and_resumes_by_its_content(llama, corpus, tmp_path):
    old = tmp_path / "old"
    assert run("--model", llama, "--data", corpus, "--output", old, *QUICK).exit_code == 0
    words = ("--model", llama, "--data", corpus, "--init", old, "--training-tokens", 640,
             "--batch-size", 64, "--save-every", 5)  # fmt: skip
    done = run(*words, "--output", tmp_path / "straight")
    assert done.exit_code == 0, done.output
    sae = load_sae(tmp_path / "straight")
    assert (sae.k, sae.n_features, sae.site) == (6, 64, Site(2))  # the old one's own
    assert "| started from | old |" in (tmp_path / "straight" / "README.md").read_text()
    first = json.loads((tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()[0])
    cold = json.loads((old / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < cold["loss"]
    stopped_after(7, *words, "--output", tmp_path / "cut")
    old.rename(tmp_path / "moved")
    words = ("--init", tmp_path / "moved", *words[:4], *words[6:])
    done = run(*words, "--output", tmp_path / "cut", "--resume")
    assert done.exit_code == 0, done.output
    made = [(tmp_path / name / finish.WEIGHTS).read_bytes() for name in ("straight", "cut")]
    assert made[0] == made[1]


def test_what_does_not_agree_with_the_sae_to_start_from_is_one_plain_message(
    llama, corpus, tmp_path
):
    rng = np.random.default_rng(0)
    for width, name in ((32, "fits"), (16, "narrow")):
        rows = rng.standard_normal((64, width)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        sae = SaeWeights(
            "topk", rows.T.copy(), np.zeros(64, np.float32), k=6, w_dec=rows,
            b_dec=np.zeros(width, np.float32), site=Site(1),
        )  # fmt: skip
        write_saelens(sae, tmp_path / name)
    common = ("--model", llama, "--data", corpus, "--output", tmp_path / "o", "--training-tokens",
              640, "--batch-size", 64)  # fmt: skip
    for name, more, part in (
        ("narrow", (), "reads vectors of 16, but"),
        ("fits", ("--architecture", "jumprelu"), "Give --architecture topk"),
        ("fits", ("--width", 128), "has 64 features, and --width is 128"),
        ("fits", ("--site", "mlp_out"), "Give --site resid_post"),
    ):
        done = run(*common, "--init", tmp_path / name, *more)
        assert done.exit_code in (1, 2), done.output
        assert part in done.output
    done = run(*common, "--sae-k", 3)
    assert "--init is missing" in done.output
    assert not (tmp_path / "o" / "cfg.json").exists()


def test_activations_are_those_of_the_whole_model(llama, tokenizer, corpus):
    whole = load_model(llama)
    site = Site(2)
    documents = texts.read_documents(str(corpus), tokenizer, max_length=64).items[:7]
    policy = Policy(whole.model, whole.config, [site], share_prompt=False)
    wanted = []
    for document in documents:
        pair = TokenPair(document.tokens[:1], document.tokens[1:], document.tokens[1:], 0)
        tapped = np.array(policy.rows([pair]).tapped[0])[: len(document.tokens) - 1]
        wanted.append(tapped[document.keep[:-1]])  # the policy has no row for the last token
    cut = load_model(llama)
    reader = activations.open_reader(cut.model, cut.config, site)
    assert len(reader.backbone.layers) == 3
    found = reader.rows(documents)
    assert len(found) == sum(d.keep.sum() for d in documents)
    ends = np.cumsum([d.keep.sum() for d in documents])
    for want, end, document in zip(wanted, ends, documents, strict=True):
        rows = found[end - document.keep.sum() : end - 1]
        np.testing.assert_allclose(rows, want, rtol=1e-5, atol=2e-5)  # the BLAS's order of sums
    limit = float(np.median(activations.norms(found)))
    few = replace(reader, limit=limit).rows(documents)
    assert (activations.norms(few) <= limit).all()
    assert len(few) == pytest.approx(len(found) / 2, abs=1)


def test_a_store_is_written_once_and_refused_for_another_site(llama, corpus, tmp_path):
    words = ("--model", llama, "--data", corpus, *QUICK, "--store", tmp_path / "acts")
    assert run(*words, "--output", tmp_path / "a").exit_code == 0
    before = (tmp_path / "acts" / "rows.npy").stat().st_mtime_ns
    again = run(*words, "--output", tmp_path / "b")
    assert again.exit_code == 0
    assert (tmp_path / "acts" / "rows.npy").stat().st_mtime_ns == before
    assert (tmp_path / "a" / finish.WEIGHTS).read_bytes() == (
        tmp_path / "b" / finish.WEIGHTS
    ).read_bytes()
    other = run(*words, "--output", tmp_path / "c", "--layer", 1)
    assert other.exit_code == 2
    assert "site" in other.output


def test_a_cold_and_a_warm_start_share_a_store(llama, corpus, tmp_path):
    """Activations are the model's: what an SAE starts from does not change them."""
    words = ("--model", llama, "--data", corpus, *QUICK, "--store", tmp_path / "acts")
    cold = run(*words, "--output", tmp_path / "cold")
    assert cold.exit_code == 0, cold.output
    before = (tmp_path / "acts" / "rows.npy").stat().st_mtime_ns
    warm = run(*words, "--output", tmp_path / "warm", "--init", tmp_path / "cold")
    assert warm.exit_code == 0, warm.output
    assert (tmp_path / "acts" / "rows.npy").stat().st_mtime_ns == before


def stopped_after(updates: int, *words):
    """Run and stop, as Ctrl-C does."""
    with pytest.MonkeyPatch.context() as patch:
        asked = iter(range(1, 1000))
        patch.setattr(SIGNALS, lambda: nullcontext(lambda: lambda: 143 * (next(asked) >= updates)))
        done = run(*words)
    assert done.exit_code == 143, done.output


def test_a_signal_behind_the_last_update_ends_the_command_at_once(
    llama, corpus, tmp_path, monkeypatch
):
    """It was swallowed, over the held-out pass, the loss and an upload."""
    before, seen = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(
        sae_finish, "write", lambda *_: seen.append(signal.getsignal(signal.SIGTERM))
    )
    done = run("--model", llama, "--data", corpus, "--output", tmp_path / "o", *QUICK)
    assert done.exit_code == 0, done.output
    assert seen == [before]


def test_a_signal_amid_the_last_update_stops_there_and_resume_measures(llama, corpus, tmp_path):
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", tmp_path / "o")
    stopped_after(40, *words)
    assert not (tmp_path / "o" / "cfg.json").exists()
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.output
    assert "resumed after step 40 of 40" in done.output
    assert "held-out rows" in (tmp_path / "o" / "README.md").read_text()


def test_chunks_smaller_than_a_batch_end_no_run(llama, corpus, tmp_path):
    words = ("--model", llama, "--data", corpus, *QUICK, "--memory-gb", 1.9e-5)
    straight = run(*words, "--output", tmp_path / "straight")
    assert straight.exit_code == 0, straight.output
    last = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 40
    stopped_after(31, *words, "--output", tmp_path / "cut")
    done = run(*words, "--output", tmp_path / "cut", "--resume")
    assert done.exit_code == 0, done.output
    made = [(tmp_path / name / finish.WEIGHTS).read_bytes() for name in ("straight", "cut")]
    assert made[0] == made[1]


def test_a_bound_below_one_batch_is_one_plain_message(llama, corpus, tmp_path):
    words = ("--model", llama, "--data", corpus, *QUICK, "--memory-gb", 5e-6)
    done = run(*words, "--output", tmp_path / "o")
    assert done.exit_code == 1, done.output
    assert "--memory-gb has room for 39 activations" in done.output
    assert "batch of 64" in done.output


def test_a_store_of_another_split_is_refused(llama, corpus, tmp_path):
    """Both splits hold out documents behind those that the norm limit is measured on."""
    words = ("--model", llama, "--data", corpus, *QUICK, "--store", tmp_path / "acts")
    words = (*words, "--seed", 2)
    held = [
        texts.split_held_out(items_of(corpus, load_tokenizer(llama)), share, 2, 10**9)[1]
        for share in (0.005, 0.02)
    ]
    assert len(held[0]) < len(held[1])
    first = run(*words, "--held-out", 0.005, "--output", tmp_path / "a")
    assert first.exit_code == 0, first.output
    about = json.loads((tmp_path / "acts" / "store.json").read_text())
    other = run(*words, "--held-out", 0.02, "--output", tmp_path / "b")
    assert other.exit_code == 2, other.output
    assert "training_documents" in other.output
    assert "norm_limit" not in other.output  # the split alone
    assert "--held-out" in other.output
    assert not (tmp_path / "b" / "cfg.json").exists()
    del about["training_documents"]
    (tmp_path / "acts" / "store.json").write_text(json.dumps(about))
    old = run(*words, "--held-out", 0.005, "--output", tmp_path / "c")
    assert old.exit_code == 2, old.output
    assert "written again" in old.output


def asked_twice(path):
    """Chats, each first question in two of them."""
    rows = [
        {"messages": [{"role": "user", "content": TEXTS[i // 2]},
                      {"role": "assistant", "content": text}]}
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_resumed_run_is_refused_where_other_documents_would_be_held_out(
    llama, tmp_path, monkeypatch
):
    """As by another version, which splits otherwise."""
    chats, split = asked_twice(tmp_path / "chats.jsonl"), texts.split_held_out
    words = ("--model", llama, "--data", chats, *QUICK, "--output", tmp_path / "o",
             "--training-tokens", 6400)  # fmt: skip

    def swapped(items, *how):
        train, held = split(items, *how)
        assert len(train) > sae_setup.CALIBRATION  # by which the norm limit stays
        return [*train[:-1], held[-1]], [*held[:-1], train[-1]]

    with monkeypatch.context() as patch:
        patch.setattr(texts, "split_held_out", swapped)
        stopped_after(5, *words)
    refused = run(*words, "--resume")
    assert refused.exit_code == 2, refused.output
    assert "training_documents" in refused.output
    assert "norm_limit" not in refused.output  # the split alone


@pytest.mark.parametrize("kind", ["chats that share questions", "chats", "pairs", "texts"])
def test_a_run_of_a_version_that_kept_no_split_goes_on_only_where_there_was_one_split(
    llama, tmp_path, kind
):
    """That version held rows out without looking at what they share."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "o"
    rows = {"texts": [{"text": text} for text in TEXTS], "chats": CHATS, "pairs": PAIRS}.get(kind)
    if rows is None:
        asked_twice(data)
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--model", llama, "--data", data, *QUICK, "--output", out)
    stopped_after(5, *words)
    record = json.loads((out / "run.json").read_text())
    record["fingerprints"].pop("training_documents", None)
    if kind in ("chats that share questions", "pairs"):
        record["fingerprints"]["norm_limit"] = "another split's"
    (out / "run.json").write_text(json.dumps(record))
    done = run(*words, "--resume")
    if kind in ("texts", "chats"):
        assert done.exit_code == 0, done.output
    else:
        assert done.exit_code == 2, done.output
        assert "an older version began the run" in done.output
        assert "--overwrite" in done.output
        assert "norm_limit" not in done.output  # which would not say what to do


def items_of(corpus, tokenizer):
    return texts.read_documents(str(corpus), tokenizer, max_length=1024).items


@pytest.mark.parametrize("stored_first", [True, False])
def test_a_store_is_not_put_under_a_run_half_way(llama, corpus, tmp_path, stored_first):
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", tmp_path / "o")
    store = ("--store", tmp_path / "acts")
    first, then = (store, ()) if stored_first else ((), store)
    stopped_after(5, *words, *first)
    refused = run(*words, *then, "--resume")
    assert refused.exit_code == 2, refused.output
    assert "--store" in refused.output
    assert "chunks" in refused.output
    assert (tmp_path / "acts").exists() == stored_first  # nothing was written in vain
    done = run(*words, *first, "--resume")
    assert done.exit_code == 0, done.output


def test_a_store_may_have_moved_when_a_run_goes_on(llama, corpus, tmp_path):
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", tmp_path / "o")
    stopped_after(5, *words, "--store", tmp_path / "acts")
    (tmp_path / "acts").rename(tmp_path / "elsewhere")
    done = run(*words, "--store", tmp_path / "elsewhere", "--resume")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("within", [".", "acts", "a/b"])
def test_a_store_within_the_output_is_refused_before_anything_is_computed(
    llama, corpus, tmp_path, monkeypatch, within
):
    """The folder would hold it when the run begins, and be refused then."""
    monkeypatch.setattr(model_open, "open_model", lambda *a, **k: pytest.fail("it was begun"))
    out = tmp_path / "o"
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", out, "--store", out / within)
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert "lies in --output" in done.output
    assert not out.exists()


def test_a_resumed_run_says_that_a_new_budget_has_no_effect(llama, corpus, tmp_path):
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", tmp_path / "o")
    stopped_after(5, *words)
    done = run(*words, "--resume", "--passes", 1)
    assert done.exit_code == 0, done.output
    assert "keeps its 40 updates: --passes has no effect on --resume" in done.output
    again = run(*words, "--resume")
    assert "no effect" not in again.output


def test_a_run_clears_what_a_killed_one_left(llama, corpus, tmp_path):
    out, acts = tmp_path / "o", tmp_path / "acts"
    out.mkdir()
    acts.mkdir()
    dead = [out / f".tmp-1-{name}" for name in ("checkpoint.safetensors", "run.json")]
    dead += [acts / f".tmp-1-{name}" for name in ("rows.npy", "store.json")]
    for path in (*dead, out / ".tmp-1-mine.txt", acts / "store.lock"):  # a lock stays
        path.write_text("half")
    for folder in (out / ".tmp-1-.tmp-0-sae", out / ".tmp-0-sae"):  # killed while moving it
        folder.mkdir()
        (folder / "README.md").write_text("half")
        dead.append(folder)
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", out, "--store", acts)
    with locks.held(out / "writer.lock", out):
        assert "being written" in run(*words).output
    assert all(path.exists() for path in dead)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert not [path for path in dead if path.exists()]
    assert (out / ".tmp-1-mine.txt").exists()
    assert {p.name for p in acts.iterdir()} == {"rows.npy", "store.json"}


def test_too_few_held_out_positions_cost_the_figures_and_not_the_sae(llama, tmp_path):
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(json.dumps({"text": chr(97 + i % 26)}) + "\n" for i in range(60)))
    out = tmp_path / "o"
    done = run("--model", llama, "--data", path, "--output", out, "--held-out", 1e-3,
               "--training-tokens", 64, "--batch-size", 16, "--width", 64, "--k", 6,
               "--json", tmp_path / "figures.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.index("--held-out") < done.output.index("updates of 16 tokens")
    assert load_sae(out).n_features == 64
    assert "fvu" not in json.loads((tmp_path / "figures.json").read_text())
    assert "held-out rows" not in (out / "README.md").read_text()
    assert "no two differ" in done.output


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--k", "0"], 2, "--k 0"),
        (["--k", "64", "--width", "64"], 2, "fewer than --width"),
        (["--layer", "4"], 2, "blocks are 0 to 3"),
        (["--site", "nowhere"], 2, "resid_post"),
        (["--minutes", "1", "--training-tokens", "5"], 2, "exclude each other"),
        (["--held-out", "1"], 2, "--held-out"),
        (["--seed", "-1"], 2, "--seed -1: wanted 0 or more"),
        (["--width", "60", "--matryoshka"], 2, "8 divides"),
        (["--batch-size", "8", "--micro-batch-size", "9"], 2, "larger than --batch-size"),
        (["--batch-size", "100000"], 1, "fewer than one batch"),
        (["--tokens", "response"], 3, "--tokens all"),
        (["--data", "absent.jsonl"], 1, "no such file"),
        (["--model", "./absent"], 1, "config.json"),
        (["--resume"], 2, "holds no checkpoint"),
        (["--architecture", "gated"], 2, "gated"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_one_plain_message(llama, corpus, tmp_path, words, code, part):
    out = tmp_path / "out"
    done = run("--model", llama, "--data", corpus, "--output", out, *QUICK[2:], *words)
    assert done.exit_code == code, done.output
    assert part in done.output
    assert "Traceback" not in done.output
    assert not list(out.glob("*.json")) + list(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"a": 1}], "columns a"),
        ([{"text": 3}], "rows.jsonl:1: text is a number, wanted a text"),
        ([CHATS[0], {"messages": []}], "rows.jsonl:2"),
        ([{"messages": [{"role": "user"}]}], "messages[0] has no content"),
        ([PAIRS[0], {"prompt": "a", "chosen": "b", "rejected": "b"}], "rows.jsonl:2"),
    ],
)
def test_rows_that_cannot_be_used_are_named(llama, tmp_path, rows, part):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("--model", llama, "--data", path, "--output", tmp_path / "out", *QUICK)
    assert done.exit_code == 3, done.output
    assert part in done.output


def test_yaml_fills_the_settings_and_unknown_keys_are_errors(tmp_path):
    path = tmp_path / "sae.yaml"
    path.write_text("learning_rate: 1e-3\nk: 12\nmatryoshka: true\n")
    config = load_section(SaeTrainConfig, {"k": 16}, path)
    assert (config.learning_rate, config.k, config.matryoshka) == (1e-3, 16, True)
    path.write_text("widht: 3\n")
    with pytest.raises(FpoError, match="unknown settings widht. Did you mean width"):
        load_section(SaeTrainConfig, {}, path)
    path.write_text("k: many\nlearning_rate: [1]\n")
    both = r"--k 'many': wanted a whole number\.\n--learning-rate \[1\]"
    with pytest.raises(FpoError, match=both):
        load_section(SaeTrainConfig, {}, path)  # all faults at once


def test_sizes_follow_from_the_model():
    for blocks, hidden, wanted in ((30, 576, (27, 4096, 32)), (26, 2304, (23, 16384, 64))):
        found = sizes(SaeTrainConfig(), {"num_hidden_layers": blocks}, hidden)
        assert (found.layer, found.width, found.k) == wanted
        assert found.aux_k == hidden // 2
    assert learning_rate(SaeTrainConfig(), 1024) == 3e-3
    assert learning_rate(SaeTrainConfig(), 16384) == 1.5e-3
    assert learning_rate(SaeTrainConfig(learning_rate=1.0), 16384) == 1.0


def test_minutes_become_tokens():
    # 1 ms an activation, 3 ms a training step's token; 10 s are 2500 tokens of both
    assert steps_in_time(10, per_row=1e-3, per_token=3e-3, available=9999, reused=True) == 2500
    # one pass of 1000 costs 4 s, the other 6 s train 2000 more without new activations
    assert steps_in_time(10, per_row=1e-3, per_token=3e-3, available=1000, reused=True) == 3000
    assert steps_in_time(10, per_row=1e-3, per_token=3e-3, available=1000, reused=False) == 2500


def test_the_time_of_an_activation_is_that_of_a_kept_row(llama, tmp_path, monkeypatch):
    """Of pairs whose answers alone are trained on most tokens are run for nothing."""
    path, clock = tmp_path / "pairs.jsonl", iter((0.0, 10.0))
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    monkeypatch.setattr(sae_setup, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    config = SaeTrainConfig(model=str(llama), data=str(path), tokens="response")
    setup = sae_setup.open_setup(config, Ranks(), lambda _: None)
    assert len(setup.train) <= sae_setup.CALIBRATION  # all of them are measured
    assert setup.seconds_a_row * setup.positions == pytest.approx(10)


class Hub:
    """Stands in for huggingface_hub's client."""

    def __init__(self, calls, error=None):
        self.calls, self.error = calls, error

    def create_repo(self, repo, exist_ok):
        self.calls.append(("create", repo, exist_ok))

    def list_repo_files(self, repo):
        return []

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(allow_patterns)))


def test_an_upload_carries_the_sae_and_its_card_alone(llama, corpus, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(calls))
    words = ("--model", llama, "--data", corpus, "--output", tmp_path / "o", *QUICK)
    done = run(*words, "--upload-repo", "me/sae")
    assert done.exit_code == 0, done.output
    assert calls == [
        ("create", "me/sae", True),
        ("upload", "me/sae", ["README.md", "cfg.json", "sae_weights.safetensors"]),
    ]
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub([], OSError("401 no token")))
    with pytest.raises(FpoError, match="401 no token") as refused:
        publish.upload(tmp_path / "o", "me/sae", "The SAE")
    assert "HF_TOKEN" in str(refused.value)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_finished_run_that_is_resumed_is_published_as_it_stands(
    llama, corpus, tmp_path, monkeypatch, checkpoint
):
    """Its card may have been edited meanwhile, and its checkpoint removed to save room."""
    out, calls = tmp_path / "o", []
    words = ("--model", llama, "--data", corpus, "--output", out, *QUICK)
    assert run(*words).exit_code == 0
    (out / "README.md").write_text("my own words")
    if not checkpoint:
        (out / state.STATE).unlink()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(calls))
    monkeypatch.setattr(model_open, "open_model", lambda *a, **k: pytest.fail("a model is opened"))
    done = run(*words, "--resume", "--upload-repo", "me/sae", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    assert "finished before" in done.output
    assert [call[:2] for call in calls] == [("create", "me/sae"), ("upload", "me/sae")]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert json.loads((tmp_path / "r.json").read_text()) == {"tokens": 2560}
    for other, part in ((("--seed", 1), "seed: was 0, now 1"), (("--k", 7), "k: was 6, now 7")):
        refused = run(*words, *other, "--resume")
        assert refused.exit_code == 2, refused.output
        assert part in refused.output


@pytest.mark.parametrize("how", [(), ("--resume",), ("--overwrite",)])
def test_the_folder_of_a_run_of_adapters_is_refused_by_name(llama, corpus, tmp_path, how):
    out, record = tmp_path / "o", {"settings": {}, "fingerprints": {}}
    out.mkdir()
    (out / "run.json").write_text(json.dumps(record))
    for name in ("metrics.jsonl", "adapters.safetensors"):
        (out / name).write_text("theirs")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = run("--model", llama, "--data", corpus, *QUICK, "--output", out, *how)
    assert done.exit_code == 2, done.output
    assert "holds a run of `fpo-mlx train`, not of `fpo-mlx sae train`" in done.output
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("killed_in", ["measure", "evaluate"])
def test_a_run_that_was_killed_while_figures_were_taken_gets_them_on_resume(
    llama, corpus, tmp_path, monkeypatch, killed_in
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ("--model", llama, "--data", corpus, *QUICK)
    loss = SimpleNamespace(loss=LossFigures(2.0, 2.5, 7.0, "zero"))
    monkeypatch.setattr("fpo_mlx.judge.sae_fit.evaluate", lambda *a: loss)
    assert run(*words, "--output", whole).exit_code == 0
    with monkeypatch.context() as patch:
        place = finish if killed_in == "measure" else sae_fit
        patch.setattr(place, killed_in, killed)
        assert run(*words, "--output", cut).exit_code != 0
    assert (cut / finish.CONFIG).is_file()
    assert "loss recovered" not in (cut / finish.CARD).read_text()
    done = run(*words, "--output", cut, "--resume", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    for name in finish.PUBLISHED:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert "loss_recovered" in json.loads((tmp_path / "r.json").read_text())
    assert "finished before" in run(*words, "--output", cut, "--resume").output


@pytest.mark.parametrize("change", ["card", "checkpoint", "older"])
def test_a_run_without_figures_stays_where_they_cannot_be_written_to_its_card(
    llama, corpus, tmp_path, monkeypatch, change
):
    """An edited card is left alone, and an older version noted nothing."""
    out = tmp_path / "o"
    words = ("--model", llama, "--data", corpus, *QUICK, "--output", out)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "measure", killed)
        assert run(*words).exit_code != 0
    if change == "card":
        (out / finish.CARD).write_text("my own words")
    elif change == "checkpoint":
        (out / state.STATE).unlink()
    else:
        record = json.loads((out / "run.json").read_text())
        del record["cards"]
        (out / "run.json").write_text(json.dumps(record))
    before = (out / finish.CARD).read_bytes()
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.output
    assert "finished before" in done.output
    assert (out / finish.CARD).read_bytes() == before


def test_a_run_that_died_before_its_first_checkpoint_is_told_what_can_be_done(
    llama, corpus, tmp_path, monkeypatch
):
    words = ("--model", llama, "--data", corpus, "--output", tmp_path / "o", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr("fpo_mlx.saetrain.trainer.step", lambda *a: (float("nan"), 0.0))
        died = run(*words)
    assert died.exit_code == 4, died.output
    assert "--learning-rate" in died.output
    resumed, again = run(*words, "--resume"), run(*words)
    assert (resumed.exit_code, again.exit_code) == (2, 2)
    for said in (died, resumed, again):
        assert "--overwrite" in said.output
    assert "ended before its first checkpoint" in resumed.output
    assert "Start without --resume" not in resumed.output
    assert "goes on with it" not in again.output
    assert run(*words, "--overwrite").exit_code == 0
