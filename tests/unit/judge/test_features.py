"""Feature reports: planted features are found, what moved is counted right, contexts are real."""

from __future__ import annotations

import csv
import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_mlx.data import data_fingerprint, read_split
from fpo_mlx.data.feature_files import read_weights
from fpo_mlx.data.tokenize import tokenize_row
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.judge.feature_report import Tally, TextActivations, _parts, auc, find
from fpo_mlx.records import Passage, SaeWeights, Site
from fpo_mlx.sae.encode import encode
from fpo_mlx.storage.files import sha256_of

# find ---------------------------------------------------------------------------------------------

D, F, PLANTED = 64, 256, (7, 40, 111, 180, 254)


def synthetic_sae(rng) -> SaeWeights:
    """Unit columns, and a threshold that noise does not reach."""
    w = rng.normal(size=(D, F))
    w /= np.linalg.norm(w, axis=0)
    threshold = np.full(F, 2.0, np.float32)
    return SaeWeights(
        "jumprelu", w.astype(np.float32), np.zeros(F, np.float32), threshold=threshold
    )


def texts_of(sae, rng, n, planted) -> TextActivations:
    """Texts of 20 tokens: noise, two features that all texts share, and the planted ones."""
    strongest, means = [], []
    for number in range(n):
        x = 0.2 * rng.normal(size=(20, D))
        for feature in (3, 99):  # loud everywhere
            x[rng.integers(20)] += 9 * sae.w_enc[:, feature]
        for feature in planted:
            x[rng.integers(20)] += rng.uniform(3, 5) * sae.w_enc[:, feature]
        if planted and number == 0:
            x[4] += 60 * sae.w_enc[:, 20]  # once, and very loud
        acts = encode(sae, x.astype(np.float32))
        strongest.append(acts.max(axis=0))
        means.append(acts.mean(axis=0))
    return TextActivations(np.stack(strongest), np.stack(means))


@pytest.mark.parametrize("seed", range(5))
def test_planted_features_are_recovered_exactly(seed):
    rng = np.random.default_rng(seed)
    sae = synthetic_sae(rng)
    positive, negative = texts_of(sae, rng, 40, PLANTED), texts_of(sae, rng, 40, ())
    found = find(positive, negative, len(PLANTED))
    assert {one.feature for one in found} == set(PLANTED)
    for one in found:
        assert one.auc > 0.95
        assert one.held_out_auc is not None
        assert one.held_out_auc > 0.9
        assert one.positive > one.negative
    assert {one.feature for one in find(negative, positive, F)} & set(PLANTED) == set()


def test_two_sets_of_the_same_texts_have_no_feature_between_them():
    rng = np.random.default_rng(0)
    same = texts_of(synthetic_sae(rng), rng, 20, PLANTED)
    assert find(same, same, 5) == []


numbers = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@given(a=numbers, b=numbers)
def test_the_area_is_the_share_of_pairs_in_order(a, b):
    wins = [float(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert auc(np.array(a), np.array(b)) == pytest.approx(np.mean(wins))


# What moved ---------------------------------------------------------------------------------------


def test_changes_effect_and_share_by_hand():
    """Two pairs, three features, k = 1. Moves of feature 0: +1 +1 +1 +3; feature 2 stays."""
    tally = Tally(3, 1, magnitude=False, weights={})
    ref = np.array([[1.0, 0, 5], [1, 0, 5]])
    first = tally.add(np.array([[2.0, 4, 5], [2, 9, 5]]), ref)
    second = tally.add(np.array([[2.0, 0, 5], [4, 0, 5]]), ref)
    # I of the second response: {1} (policy) and {2} (reference); of all others {2}
    np.testing.assert_allclose(first, [0, 81])
    np.testing.assert_allclose(second, [0, 0])
    most, other = tally.changes(9)
    assert (most.feature, most.share_of_d, other.feature) == (1, 1.0, 0)
    assert (other.chosen_before, other.chosen_after) == (1, 2)
    assert (other.rejected_before, other.rejected_after) == (1, 3)
    assert other.change == 1.5
    assert other.effect_size == pytest.approx(1.5 / 1.0)  # moves 1, 1, 1, 3: sd 1
    assert tally.changes(1, "effect_size")[0].feature == 0
    assert tally.changes(1, "change")[0].feature == 1


def test_equal_moves_have_a_bounded_effect_size():
    """Their spread is 0, and what rounding makes of it is no measure."""
    tally = Tally(2, 1, magnitude=False, weights={})
    for _ in range(20):
        tally.add(np.array([[0.3, 1.0], [0.3, 1.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]))
    assert tally.effect_sizes().tolist() == [1e6, 0]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.0])
def test_as_many_texts_are_held_out_as_was_asked(share):
    texts = TextActivations(*np.arange(2 * 40 * 1, dtype=np.float32).reshape(2, 40, 1))
    chosen, held = _parts(texts, share)
    n = 0 if held is None else len(held.mean)
    assert n == round(40 * share)
    assert len(chosen.mean) == 40 - n
    if held is not None:
        assert np.ptp(held.mean) > 25  # from the whole file


def test_named_features_count_with_their_weight():
    tally = Tally(3, 1, magnitude=False, weights={0: 2.0, 1: 0.0})
    got = tally.add(np.array([[2.0, 9, 5], [1, 0, 5]]), np.array([[1.0, 0, 5], [1, 0, 5]]))
    np.testing.assert_allclose(got, [2, 0])


mx = pytest.importorskip("mlx.core")

import oracle  # noqa: E402
import tiny_models  # noqa: E402
from command_line import ROWS, lines, refused, run, usual  # noqa: E402
from evaluated import adapter, own_cache, place  # noqa: E402, F401
from helpers import K, random_pairs, random_sae, scorer_with_lora  # noqa: E402

from fpo_mlx.config import Objective  # noqa: E402
from fpo_mlx.judge import feature_scan  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402
from fpo_mlx.train.metrics import ScoredPairs  # noqa: E402
from fpo_mlx.train.scoring import Scorer  # noqa: E402


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "abstopk"])
@pytest.mark.parametrize("weights", [{}, {3: 2.5, 17: 0.0}], ids=["plain", "weighted"])
def test_the_parts_of_d_add_up_to_d(tmp_path, activation, weights):
    objective, sae = Objective(top_k=K), random_sae(activation, 32, Site(1))
    plain, values = scorer_with_lora(tiny_models.tiny_llama(tmp_path), objective, [sae])
    scorer = Scorer(plain.policy, plain.encoders, objective, feature_weights=[weights])
    pairs = random_pairs([(9, 5, 8), (4, 7, 3)])
    refs = scorer.reader.scores(pairs)
    adapters.update(scorer.policy.model, {k: mx.array(v) for k, v in values.items()})
    measures = scorer.losses(pairs, refs, grad=False)[1]
    done = []
    (tally,) = feature_scan.tally(scorer, ScoredPairs(pairs, refs), done.append)
    assert done == [1, 2]
    wanted = np.array(measures.distances).sum()
    assert wanted > 1e-3
    assert tally.distance.sum() == pytest.approx(wanted, rel=1e-4)
    assert sum(c.share_of_d for c in tally.changes(999)) == pytest.approx(1)


def tokens_of(passage) -> np.ndarray:
    return np.concatenate([passage.prompt, passage.response])


def test_contexts_are_the_oracles_strongest_tokens(tmp_path):
    sae = random_sae("topk", 32, Site(1))
    folder = tiny_models.tiny_llama(tmp_path)
    scorer, _ = scorer_with_lora(folder, Objective(top_k=K), [sae])
    pairs = random_pairs([(9, 5, 8), (4, 7, 3)])
    texts = list(feature_scan.pair_texts(pairs))
    assert [t.where for t in texts[:2]] == ["pair 0, chosen", "pair 0, rejected"]
    model, features, best = oracle.load_oracle(folder), [1, 5, 9, 30], {}
    for text in texts:
        (hidden,), _ = oracle.hidden_and_logits(model, tokens_of(text), Site(1))
        first = len(text.prompt) - 1
        acts = oracle.encode(sae, hidden[first : first + len(text.response)]).numpy(force=True)
        for feature in features:
            at = int(acts[:, feature].argmax())
            if acts[at, feature] > 0:
                best.setdefault(feature, []).append(
                    (acts[at, feature], tokens_of(text)[first + at], text.where)
                )
    got = feature_scan.contexts(
        scorer.policy, scorer.encoders[0], 0, texts, features, 2, lambda ids: f"{list(ids)}"
    )
    assert best
    for feature in features:
        wanted = sorted(best.get(feature, []), reverse=True)[:2]
        assert len(got[feature]) == len(wanted)
        for context, (value, token, where) in zip(got[feature], wanted, strict=True):
            assert context.activation == pytest.approx(value, rel=1e-4)
            assert context.token == f"[{token}]"
            assert context.where == where
            assert f"«[{token}]»" in context.text


def test_no_model_runs_where_no_feature_moved():
    text, nothing = Passage(np.array([1, 2]), np.array([3])), SimpleNamespace()
    policy: Any = nothing  # a model that cannot be run
    encoder: Any = nothing
    assert feature_scan.contexts(policy, encoder, 0, [text], [], 3, str) == {}


# The commands -------------------------------------------------------------------------------------


def test_features_says_what_an_adapter_moved(place, tmp_path):  # noqa: F811
    (tmp_path / "labels.json").write_text(json.dumps({str(i): f"label {i}" for i in range(48)}))
    words = ["--adapter-path", place / "one", "--split", "valid", "--top-k", 5, "--top", 6]
    files = ["--json", tmp_path / "f.json", "--csv", tmp_path / "f.csv"]
    labels = ["--labels", tmp_path / "labels.json"]
    done = run("features", *usual(place), *words, *files, *labels)
    assert done.exit_code == 0, done.stderr
    got = json.loads((tmp_path / "f.json").read_text())
    assert got["pairs"] == len(ROWS)
    assert got["adapter_sha256"] == sha256_of(place / "one" / "adapters.safetensors")
    assert len(got["features"]) == 6
    shares = [row["share_of_d"] for row in got["features"]]
    assert shares == sorted(shares, reverse=True)
    top = got["features"][0]
    assert top["label"] == f"label {top['feature']}"
    assert top["contexts"][0]["token"] == top["tokens"][0]
    assert top["contexts"][0]["text"].count("«") == 1
    assert re.search(rf"^{top['feature']} .*label {top['feature']}$", done.stdout, re.MULTILINE)
    with open(tmp_path / "f.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["feature"]) for row in rows] == [row["feature"] for row in got["features"]]
    judged = run(
        "evaluate", *usual(place), "--adapter-path", place / "one", "--split", "valid",
        "--top-k", 5, "--samples", 0, "--no-kl", "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert judged.exit_code == 0, judged.stderr
    summary = json.loads((tmp_path / "e.json").read_text())["summary"]
    mean = (summary["features/chosen"] + summary["features/rejected"]) / 2
    assert got["distance"] == [pytest.approx(mean, rel=1e-4)]


def test_features_say_of_which_split_they_are_and_whether_the_adapter_was_trained_on_it(
    place,  # noqa: F811
    tmp_path,
):
    adapter, out = tmp_path / "own", tmp_path / "f.json"
    shutil.copytree(place / "one", adapter)
    tokenizer, rows = load_tokenizer(place / "model"), read_split(place / "data", "valid")
    pairs = data_fingerprint(tokenize_row(row, tokenizer) for row in rows)

    def told(split, trained_on):
        (adapter / "run.json").write_text(json.dumps({"fingerprints": {"data": trained_on}}))
        words = ["--adapter-path", adapter, "--split", split, "--examples", 0, "--limit", 2]
        words += ["--data", place / "data" / "valid.jsonl", "--json", out, "--overwrite"]
        done = run("features", *usual(place, data=None), *words)
        assert done.exit_code == 0, done.stderr
        got = json.loads(out.read_text())
        return got["split"], got.get("trained_on")

    assert told("valid", "others") == ("valid", None)
    assert told("test", pairs) == ("test", True)
    assert told("train", "others") == ("train", None)


def test_a_neuronpedia_link_is_made_where_the_name_is_known():
    from fpo_mlx.pipeline.features import link

    sae = SaeWeights("relu", np.eye(2), np.zeros(2), neuronpedia="gemma-2-2b/25-gemmascope-res-16k")
    assert link(sae, 7) == "https://www.neuronpedia.org/gemma-2-2b/25-gemmascope-res-16k/7"
    assert link(SaeWeights("relu", np.eye(2), np.zeros(2)), 7) == ""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model whose embedding the SAE reads: a feature for each of some letters."""
    root = tmp_path_factory.mktemp("planted")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.model.load import load_model

    table = np.array(load_model(root / "model").model.model.embed_tokens.weight)  # [V, D]
    tokenizer = load_tokenizer(root / "model")
    ids = [tokenizer.text_tokens(letter)[0] for letter in "QZXJabcde"]
    columns = table[ids] / np.linalg.norm(table[ids], axis=1, keepdims=True)
    size = 0.95 * np.linalg.norm(table[ids], axis=1)
    sae = SaeWeights(
        "jumprelu", columns.T.copy(), np.zeros(len(ids), np.float32),
        threshold=size.astype(np.float32), w_dec=columns.copy(),
        b_dec=np.zeros(table.shape[1], np.float32), site=Site(0, "resid_pre"),
    )  # fmt: skip
    write_saelens(sae, root / "sae")
    rng = np.random.default_rng(0)

    def text(letters):
        return "..." + "".join(rng.permutation(list(letters)))

    lines(root / "with.jsonl", *({"text": text("aabbcdeQZ")} for _ in range(10)))
    lines(root / "without.jsonl", *({"text": text("aabbccdde")} for _ in range(10)))
    return root


def test_find_recovers_planted_features_through_a_model_and_writes_weights(planted, tmp_path):
    sets = ["--positive", planted / "with.jsonl", "--negative", planted / "without.jsonl"]
    out = ["--output", tmp_path / "w.csv", "--weight", 3, "--json", tmp_path / "f.json", "--top", 2]
    model = ["--model", planted / "model", "--sae", planted / "sae"]
    done = run("features", "find", *model, *sets, *out)
    assert done.exit_code == 0, done.stderr
    assert read_weights(tmp_path / "w.csv", [9]) == ({0: 3.0, 1: 3.0},)  # Q and Z
    written = json.loads((tmp_path / "f.json").read_text())
    assert (written["kind"], written["version"]) == ("features find", 1)
    found = written["found"]
    assert {row["feature"]: row["contexts"][0]["token"] for row in found} == {0: "Q", 1: "Z"}
    assert [row["auc"] for row in found] == [1.0, 1.0]
    assert [row["held_out_auc"] for row in found] == [1.0, 1.0]


BAD = {
    "no such file": (["--positive", "none.jsonl"], 3, ("none.jsonl", "cannot be read")),
    "a row without text": (["--positive", "bad.jsonl"], 3, ("bad.jsonl:2", "bad.jsonl:3")),
    "one text": (["--positive", "one.jsonl"], 3, ("one.jsonl", "two or more")),
    "output": (["--output", "w.txt"], 2, ("w.txt", ".csv")),
    "no sae": (["--sae", "nowhere"], 1, ("nowhere",)),
    "no such template": (["--chat-template", "none.jinja"], 2, ("none.jinja",)),
}


def test_a_plain_text_is_looked_at_behind_the_bos_from_its_first_token_on(planted, tmp_path):
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.pipeline.features import read_texts

    tokenizer = load_tokenizer(planted / "model")
    lines(tmp_path / "t.jsonl", {"text": "Paris"}, {"text": "Rome"})
    (found, _) = read_texts(tmp_path / "t.jsonl", tokenizer, 99)
    bos, (first, *more) = tokenizer.raw.bos_token_id, tokenizer.text_tokens("Paris")
    assert (found.prompt.tolist(), found.response.tolist()) == ([bos, first], more)


def test_a_text_keeps_within_the_length_however_long_its_prompt(planted, tmp_path):
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.errors import DataError
    from fpo_mlx.pipeline.features import read_texts

    tokenizer = load_tokenizer(planted / "model")
    row = {"prompt": "word " * 60, "response": "word " * 60}
    lines(tmp_path / "t.jsonl", row, row)
    whole = read_texts(tmp_path / "t.jsonl", tokenizer, 10**6)[0]
    prompt, both = len(whole.prompt), len(tokens_of(whole))
    for longest in (prompt + 1, prompt + 7, both, both + 5):
        (text, _) = read_texts(tmp_path / "t.jsonl", tokenizer, longest)
        assert len(tokens_of(text)) == min(longest, both)
    for longest in (prompt, prompt - 1, prompt // 2):
        with pytest.raises(DataError, match=f"--max-seq-length {longest}"):
            read_texts(tmp_path / "t.jsonl", tokenizer, longest)


def test_no_text_is_read_that_the_limit_does_not_take(planted, tmp_path):
    """A file of a million texts was read and tokenized whole for its first two hundred."""
    lines(tmp_path / "long.jsonl", *({"text": "abcd QZ"} for _ in range(3)), {"no": "text"})
    sets = ["--positive", tmp_path / "long.jsonl", "--negative", planted / "without.jsonl"]
    words = ["features", "find", "--model", planted / "model", "--sae", planted / "sae", *sets]
    done = run(*words, "--limit", 3)
    assert done.exit_code == 0, done.stderr
    refused(run(*words, "--limit", 4), 3, "long.jsonl:4")


def test_several_saes_are_refused_before_a_text_is_read(planted, tmp_path):
    sets = ["--positive", tmp_path / "none.jsonl", "--negative", tmp_path / "none.jsonl"]
    done = run("features", "find", "--model", planted / "model", *["--sae", planted / "sae"] * 2,
               *sets)  # fmt: skip
    refused(done, 2, "--sae: found 2, wanted exactly one for features find")


def test_a_text_that_the_chat_template_refuses_is_named_by_its_line(planted, tmp_path):
    from fpo_mlx.data.tokenizer import load_tokenizer
    from fpo_mlx.errors import DataError
    from fpo_mlx.pipeline.features import read_texts

    template = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('never') }}"
    (tmp_path / "t.jinja").write_text(template + "{% endif %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(planted / "model", chat_template=tmp_path / "t.jinja")
    rows = [{"prompt": prompt, "response": "b"} for prompt in ("yes", "no", "yes")]
    with pytest.raises(DataError, match=r"t\.jsonl:2: the chat template .* never"):
        read_texts(lines(tmp_path / "t.jsonl", *rows), tokenizer, 99)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_find_is_one_plain_message(planted, tmp_path, monkeypatch, case):
    words, code, parts = BAD[case]
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "bad.jsonl", {"text": "abcd"}, {"txt": "b"}, {"prompt": "a", "response": ""})
    lines(tmp_path / "one.jsonl", {"text": "abcd"})
    sets = ["--positive", planted / "with.jsonl", "--negative", planted / "without.jsonl"]
    sae = [] if "--sae" in words else ["--sae", planted / "sae"]
    result = run("features", "find", "--model", planted / "model", *sae, *sets, *words)
    refused(result, code, *parts)
    assert {p.name for p in tmp_path.iterdir()} == {"bad.jsonl", "one.jsonl"}


def test_features_without_adapter_sae_or_labels_is_refused(place, tmp_path):  # noqa: F811
    words = ["--adapter-path", place / "one"]
    refused(run("features", *usual(place)), 2, "--adapter-path is missing")
    for own in (words, ["data"]):  # which no objective can make do without
        done = run("features", *own, *usual(place, sae=None))
        refused(done, 2, "--sae is missing", "`fpo-mlx sae list --model ")
        assert "--objective" not in done.stderr
    refused(run("features", *usual(place), *words, "--labels", tmp_path / "no"), 2, "--labels")
    refused(run("features", *usual(place), "--adapter-path", place), 1, "adapter_config.json")
