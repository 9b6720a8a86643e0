"""--sae to a path: the hub's own functions are replaced, nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from sae_files import K
from tiny_saes import CASES

from fpo_mlx.errors import SaeError
from fpo_mlx.sae import load_sae, registry
from fpo_mlx.sae.names import stem
from fpo_mlx.sae.resolve import HubSae, parse, resolve


class Hub:
    """A hub of folders on disk, with the client's cache layout and a log of what was fetched."""

    def __init__(self, root: Path) -> None:
        self.root, self.fetched, self.reachable, self.sizes = root, [], True, {}
        self.extra: list[str] = []

    def folder(self, repo: str) -> Path:
        return self.root / "remote" / repo

    def snapshot(self, repo: str, revision: str | None) -> Path:
        return self.root / f"models--{repo.replace('/', '--')}" / "snapshots" / (revision or "main")

    def model_info(self, repo: str, revision: str | None = None, files_metadata: bool = False):
        assert files_metadata
        if not self.reachable:
            raise ConnectionError("no route to host\nsecond line")
        names = [f for f in self.folder(repo).rglob("*") if f.is_file()]
        if not names:
            raise huggingface_hub.errors.HFValidationError("Repository Not Found")
        known = [f.relative_to(self.folder(repo)).as_posix() for f in names] + self.extra
        siblings = [SimpleNamespace(rfilename=n, size=self.sizes.get(n, 1000)) for n in known]
        return SimpleNamespace(siblings=siblings)

    def hf_hub_download(self, repo: str, name: str, revision: str | None = None) -> str:
        target = self.snapshot(repo, revision) / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder(repo) / name, target)
            self.fetched.append(name)
        return str(target)

    def try_to_load(self, repo: str, name: str, revision: str | None = None) -> str | None:
        target = self.snapshot(repo, revision) / name
        return str(target) if target.exists() else None

    def snapshot_download(
        self, repo: str, revision: str | None = None, local_files_only: bool = False
    ) -> str:
        assert local_files_only
        if not self.snapshot(repo, revision).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(self.snapshot(repo, revision))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path)
    api = SimpleNamespace(model_info=made.model_info)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", made.try_to_load)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def put(hub: Hub, repo: str, case: str, inside: str = "", seed: int = 0) -> None:
    """A case's files as the repository's content at `inside`."""
    scratch = hub.root / f"made-{case}-{seed}"
    made = next(c for c in CASES if c.name == case).make(scratch, np.random.default_rng(seed))
    folder = made.path if made.path.is_dir() else made.path.parent
    shutil.copytree(folder, hub.folder(repo) / inside, dirs_exist_ok=True)


GEMMA = "google/gemma-scope-2b-pt-res"
PAPER = "layer_25/width_16k/average_l0_55"


def test_an_existing_path_needs_no_hub(tmp_path: Path, hub: Hub):
    hub.reachable = False
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("spec", [f"gemma-scope-2b-pt-res/{PAPER}", f"{GEMMA}/{PAPER}"])
def test_the_short_form_fetches_one_file_and_says_its_size(spec: str, hub: Hub):
    put(hub, GEMMA, "gemma_scope_res", PAPER)
    put(hub, GEMMA, "gemma_scope_res", "layer_25/width_16k/average_l0_116", seed=1)
    hub.sizes[f"{PAPER}/params.npz"] = 302_000_000
    said: list[str] = []
    sae = load_sae(resolve(spec, report=said.append))
    assert hub.fetched == [f"{PAPER}/params.npz"]
    assert said == [f"fetching {GEMMA}: 1 file(s), 302.0 MB ({PAPER}/params.npz)"]
    assert str(sae.site) == "resid_post of block 25"
    assert sae.model_name == "google/gemma-2-2b"
    said.clear()
    resolve(spec, report=said.append)  # again: from the cache, and silent
    assert (said, len(hub.fetched)) == ([], 1)


def test_a_saelens_release_is_found_by_its_own_id(hub: Hub):
    path = "layer_25/width_16k/average_l0_116"
    put(hub, GEMMA, "gemma_scope_res", path)
    sae = load_sae(resolve("gemma-scope-2b-pt-res-canonical/layer_25/width_16k/canonical"))
    assert hub.fetched == [f"{path}/params.npz"]
    assert sae.neuronpedia == "gemma-2-2b/25-gemmascope-res-16k"


def test_a_revision_is_pinned(hub: Hub):
    put(hub, "someone/sae", "saelens_topk")
    path = resolve("someone/sae@abc123")
    assert path.parent.name == "abc123"
    assert load_sae(path).activation == "topk"
    assert resolve("someone/sae", revision="abc123") == path


@pytest.mark.parametrize("revision", ["", "a b", "-x@y", "a?b"])
def test_what_is_no_revision_is_refused_without_network(revision: str, hub: Hub):
    hub.reachable = False
    with pytest.raises(SaeError, match="is no revision; wanted a branch, tag or commit"):
        resolve(f"someone/sae@{revision}/layer_3")


def test_only_weights_and_their_configs_are_fetched(hub: Hub):
    put(hub, "someone/saes", "saelens_topk", "blocks.3")
    put(hub, "someone/saes", "saelens_gated", "blocks.4")
    for name in ("README.md", "blocks.3/sparsity.safetensors", "blocks.3/optimizer.pt"):
        (hub.folder("someone/saes") / name).write_text("x")
    load_sae(resolve("someone/saes/blocks.3"))
    assert sorted(hub.fetched) == ["blocks.3/cfg.json", "blocks.3/sae_weights.safetensors"]


COMPANIONS = [
    ("llama_scope", "Llama3_1-8B-Base-L3M-8x", "checkpoints/final.safetensors", "hyperparams.json"),
    ("sparsify_topk", "layers.3", "sae.safetensors", "cfg.json"),
    ("dictionary_gated", "resid_post_layer_3/trainer_0", "ae.pt", "config.json"),
    ("mntss", "", "W_enc_3.safetensors", "config.yaml"),
]


@pytest.mark.parametrize(("case", "inside", "weights", "config"), COMPANIONS)
def test_each_layout_brings_its_own_config(
    case: str, inside: str, weights: str, config: str, hub: Hub
):
    case = "dictionary_GatedAutoEncoder" if case == "dictionary_gated" else case
    put(hub, "a/b", case, inside)
    sae = load_sae(resolve(f"a/b/{inside}".rstrip("/"), allow_pickle=True), allow_pickle=True)
    prefix = f"{inside}/" if inside else ""
    assert sorted(hub.fetched) == sorted([prefix + weights, prefix + config])
    assert sae.n_features == 40


def test_one_file_and_a_name_without_suffix_will_do(hub: Hub):
    put(hub, f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "qwen_scope")
    for spec in ("layer3.sae.pt", "layer3.sae"):
        path = resolve(f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/{spec}", allow_pickle=True)
        assert load_sae(path, allow_pickle=True).k == K


@pytest.mark.parametrize("spec", ["layer3.sae.pt", "layer3.sae", ""])
def test_a_pickled_sae_is_refused_before_it_is_fetched(spec: str, hub: Hub):
    repo = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    put(hub, repo, "qwen_scope")
    hub.sizes["layer3.sae.pt"] = 540_000_000
    said: list[str] = []
    with pytest.raises(
        SaeError, match=rf"{repo}/layer3\.sae\.pt is a pickled file.*--allow-pickle"
    ):
        resolve(f"{repo}/{spec}".rstrip("/"), report=said.append)
    assert (hub.fetched, said) == ([], [])
    assert resolve(f"{repo}/{spec}".rstrip("/"), allow_pickle=True).name == "layer3.sae.pt"
    assert hub.fetched == ["layer3.sae.pt"]


def test_several_saes_in_a_repository_are_listed(hub: Hub):
    put(hub, "someone/saes", "saelens_topk", "a")
    put(hub, "someone/saes", "saelens_topk", "b")
    with pytest.raises(SaeError, match=r"someone/saes/ holds 2 SAEs(.|\n)*a/sae_weights"):
        resolve("someone/saes")
    with pytest.raises(SaeError, match=r"has no SAE at 'c'(.|\n)*b/sae_weights"):
        resolve("someone/saes/c")
    assert hub.fetched == []


def test_a_download_that_does_not_fit_on_the_disk_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    put(hub, GEMMA, "gemma_scope_res", PAPER)
    hub.sizes[f"{PAPER}/params.npz"] = 3_000_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_100_000_000))
    with pytest.raises(SaeError, match=r"needs 3\.00 GB, but .* has 3\.10 GB free"):
        resolve(f"{GEMMA}/{PAPER}")
    assert hub.fetched == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_160_000_000))
    resolve(f"{GEMMA}/{PAPER}")
    assert hub.fetched


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/passwd", "a\\..\\b.pt"])
def test_a_listing_that_leaves_its_folder_is_refused(name: str, hub: Hub):
    put(hub, "someone/sae", "saelens_topk")
    hub.extra = [name]
    with pytest.raises(SaeError, match="outside of its own folder"):
        resolve("someone/sae")
    assert hub.fetched == []


def test_without_network_the_cached_copy_is_used(hub: Hub):
    put(hub, "someone/sae", "saelens_topk", "x")
    fresh = load_sae(resolve("someone/sae/x")).fingerprint()
    hub.reachable = False
    said: list[str] = []
    assert load_sae(resolve("someone/sae/x", report=said.append)).fingerprint() == fresh
    assert said == ["someone/sae cannot be reached; using the cached copy."]
    with pytest.raises(SaeError, match=r"other/sae cannot be reached \(no route to host\) and"):
        resolve("other/sae")


def test_a_broken_download_is_a_plain_error(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    put(hub, "someone/sae", "saelens_topk")

    def broken(*_, **__):
        raise TimeoutError("read timed out")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(SaeError, match="someone/sae: the download failed: read timed out"):
        resolve("someone/sae")


@pytest.mark.parametrize(
    "spec", ["./nothing", "/no/such", "a/../b", "~/x", "name", "a//b", "C:\\x"]
)
def test_what_is_neither_path_nor_name_is_refused_without_network(spec: str, hub: Hub):
    hub.reachable = False
    with pytest.raises(SaeError, match="no such file or folder"):
        resolve(spec)


NAMES = [
    ("hf://a/b/c", HubSae("a/b", "c")),
    ("a/b@v1.0/c/d", HubSae("a/b", "c/d", "v1.0")),
    (
        "llama_scope_lxr_8x@main/l15r_8x",
        HubSae("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x", "main"),
    ),
    (
        "llama_scope_lxr_8x/l15r_8x",
        HubSae("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"),
    ),
    (
        "gemma-scope-2-1b-it-res/layer_13_width_16k_l0_medium",
        HubSae("google/gemma-scope-2-1b-it", "resid_post/layer_13_width_16k_l0_medium"),
    ),
    (
        "qwen-scope-3-1.7b-base-w32k-l50/layer20",
        HubSae("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer20.sae.pt"),
    ),
    (
        "mwhanna-qwen3-4b-transcoders/layer_7",
        HubSae("mwhanna/qwen3-4b-transcoders", "layer_7.safetensors"),
    ),
]


@pytest.mark.parametrize(("spec", "wanted"), NAMES)
def test_names_of_releases_become_repository_and_path(spec: str, wanted: HubSae):
    assert parse(spec) == wanted


def test_a_release_without_an_sae_shows_examples():
    with pytest.raises(SaeError, match=r"name one of them, e\.g\. llama_scope_lxr_8x/l\d+r_8x"):
        parse("llama_scope_lxr_8x")


EXAMPLES = {
    "gemma-scope-2b-pt-res": "layer_25/width_16k/average_l0_55",  # not 1m; what README uses
    "gemma-scope-2b-pt-res-canonical": "layer_25/width_16k/canonical",
    "gemma-scope-9b-it-res-canonical": "layer_31/width_16k/canonical",
    "gemma-scope-2-1b-pt-res": "layer_22_width_16k_l0_medium",
    "llama_scope_lxr_8x": "l31r_8x",
    "qwen-scope-3-1.7b-base-w32k-l50": "layer27",
    "gpt2-small-res-jb-feature-splitting": "blocks.8.hook_resid_pre_768",
    "gemma-2b-res-jb": "blocks.17.hook_resid_post",
    "saebench_gemma-2-2b_width-2pow12_date-0108": "blocks.12.hook_resid_post__trainer_2",
}


@pytest.mark.parametrize("release", EXAMPLES)
def test_the_example_of_a_release_is_one_near_the_output_and_no_wider_than_it_need_be(release: str):
    row = registry.named(release)
    assert row is not None
    assert row.example == f"{release}/{EXAMPLES[release]}"


def test_an_example_is_below_two_thirds_of_the_depth_only_where_the_release_has_none_above():
    for row in registry.releases():
        deep = [r for r in row.rules if r.layer + 1 >= 2 / 3 * registry.blocks(stem(row.model))]
        if deep:
            assert row.example.removeprefix(f"{row.release}/") in {rule.sae_id for rule in deep}


FITS = [
    ("mlx-community/gemma-2-2b-it-4bit", "gemma-scope-2b-pt-res", False),
    ("google/gemma-2-2b", "gemma-scope-2b-pt-res", True),
    ("mlx-community/gemma-2-9b-it-4bit", "gemma-scope-9b-it-res", True),
    ("mlx-community/gemma-3-1b-it-qat-4bit", "gemma-scope-2-1b-it-res", True),
    ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama-3.1-8b-instruct-andyrdt", True),
    ("mlx-community/Meta-Llama-3.1-8B-Instruct-4bit", "llama_scope_lxr_8x", False),
    ("mlx-community/Qwen3-1.7B-4bit", "qwen-scope-3-1.7b-base-w32k-l50", False),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "sae-SmolLM2-135M-64x", False),
    ("/models/Mistral-7B-v0.1-4bit/", "mistral-7b-res-wg", True),
]


@pytest.mark.parametrize(("model", "release", "same"), FITS)
def test_the_table_knows_what_fits_a_model(model: str, release: str, same: bool):
    found = registry.fits(model)
    row = next(row for row in found if row.release == release)
    assert registry.trained_on(row, model) is same
    exact = [registry.trained_on(row, model) for row in found]
    assert exact == sorted(exact, reverse=True)  # the model's own come first


def test_a_model_without_saes_gets_none():
    assert registry.fits("mlx-community/SmolLM3-3B-4bit") == []
    assert registry.fits({}) == []


def test_a_release_whose_name_begins_as_anothers_has_its_own_facts():
    """…-transcoders and …-transcoders-lowl0 are two releases, with pages of their own."""
    for name in ("mwhanna-qwen3-14b-transcoders", "mwhanna-qwen3-14b-transcoders-lowl0"):
        release = registry.named(name)
        assert release is not None
        for rule in release.rules[:3]:
            for place in (f"{release.repo}/{rule.path}", f"/x/{name}/{rule.path}"):
                assert registry.facts(place) == rule


def test_every_row_of_the_table_is_well_formed():
    from fpo_mlx.records import SITE_KINDS
    from fpo_mlx.sae import FORMATS

    rows = registry.releases()
    assert len({row.release for row in rows}) == len(rows) > 100
    for row in rows:
        assert row.family in FORMATS
        assert row.site in SITE_KINDS
        assert row.prefix is not None or row.rules
        for rule in row.rules:
            assert row.path_of(rule.sae_id) == rule.path
            assert "{" not in rule.path + rule.sae_id + (rule.neuronpedia or "")
