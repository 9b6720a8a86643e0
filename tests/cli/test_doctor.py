"""The doctor says what is there and what is wrong, without a network and without raising."""

import http.server
import os
import subprocess
import sys
import threading

import mlx.core as mx
import pytest
from huggingface_hub import constants

from fpo_mlx.errors import pip_install
from fpo_mlx.machine import blas, device
from fpo_mlx.pipeline import doctor


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "fpo"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def by_topic(findings):
    return {finding.topic: finding for finding in findings}


def test_the_report_names_every_topic_and_gives_advice_for_every_problem():
    found = by_topic(doctor.examine(hub_seconds=0))
    wanted = {"python", "mlx", "mlx-lm", "blas", "device", "memory", "compiler", "disk", "cache"}
    assert wanted <= set(found)
    assert "hub" not in found
    assert all(finding.advice for finding in found.values() if finding.level == "problem")


def test_a_missing_package_is_a_problem_with_a_pip_line(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("mlx", "no-such-package"))
    found = by_topic(doctor.versions())["no-such-package"]
    assert (found.level, found.advice) == ("problem", pip_install("no-such-package"))


def test_mlx_with_its_own_blas_is_a_problem_on_linux(monkeypatch):
    monkeypatch.setattr(blas, "_status", blas.BlasStatus(None, "No OpenBLAS found."))
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert doctor.blas_library().level == "problem"
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    assert doctor.blas_library().level == "ok"


def test_a_slow_product_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "gflops", lambda: 2.4)
    assert doctor._cpu_speed().level == "problem"
    monkeypatch.setattr(doctor, "gflops", lambda: 130.0)
    assert doctor._cpu_speed().level == "ok"


@pytest.mark.parametrize(
    ("installed", "share", "advised"),
    [(8, 2 / 3, None), (16, 2 / 3, 11264), (24, 2 / 3, 18432), (64, 0.75, None), (64, 0.5, 49152)],
)
def test_a_mac_is_advised_a_wired_limit_that_leaves_macos_a_quarter_and_5_gb(
    monkeypatch, installed, share, advised
):
    """80 % left a Mac of 8 GB with 1.6 GB for all but the GPU."""
    total = installed * 2**30
    info = {"device_name": "M9", "memory_size": total}
    info["max_recommended_working_set_size"] = int(share * total)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    found = by_topic(doctor.device())
    assert found["memory"].text == f"{installed} GB unified"  # as Apple counts it
    assert found["wired limit"].text.startswith(f"{share * total / 1e9:.1f} GB of it")
    advice = f"iogpu.wired_limit_mb={advised}" if advised else ""
    assert found["wired limit"].advice.rpartition(" ")[2] == advice
    assert found["wired limit"].level == ("note" if advised else "ok")


@pytest.mark.parametrize(
    ("record", "size"), [(device.cpu(), 1024), (device.gpu("metal", 1e10), 4096)]
)
def test_a_gpu_is_timed_with_a_product_that_is_longer_than_its_launch(monkeypatch, record, size):
    sizes = []
    monkeypatch.setattr(doctor, "product_rate", lambda n, *_: sizes.append(n) or 1e12)
    with device.using(record):
        assert doctor.gflops() == 1e3
    assert sizes == [size]


def test_a_session_without_a_metal_device_is_a_problem_and_no_traceback(monkeypatch):
    """In a VM or a sandbox Metal is there, and its device is not."""

    def absent():
        raise RuntimeError("[metal::load_device] No Metal device available. This typically occurs")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", absent)
    found = by_topic(doctor.examine(hub_seconds=0))
    assert found["device"].level == "problem"
    assert "No Metal device available" in found["device"].text
    assert "plain Terminal" in found["device"].advice


def test_mlx_compiles_without_a_compiler():
    """It asks for g++, and goes on with its own kernels where there is none."""
    code = (
        "import mlx.core as mx; mx.set_default_device(mx.cpu); "
        "double = mx.compile(lambda x: mx.abs(x) * 2 + x); print(double(mx.array(-3.0)).item())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PATH"} | {"PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3.0"), done.stderr


def test_another_compiler_than_the_one_that_mlx_calls_is_noted_on_linux(tmp_path, monkeypatch):
    """MLX's library calls `g++`, whatever CXX says."""
    for name in ("c++", "clang++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert (doctor.compiler().level, "g++" in doctor.compiler().advice) == ("note", True)
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    assert doctor.compiler().level == "ok"
    (tmp_path / "g++").touch(mode=0o755)
    assert doctor.compiler().text == str(tmp_path / "g++")


def test_an_unused_card_is_told_with_what_can_be_installed_for_it(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.machine, "backend", lambda: "cpu")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "gflops", lambda: 130.0)
    assert "`pip install '.[cuda13]'` in the clone" in by_topic(doctor.device())["device"].advice


class _Hub(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("status", "level"), [(200, "ok"), (404, "ok"), (403, "note"), (503, "note")]
)
def test_a_hub_that_answers_is_told_from_one_that_refuses(monkeypatch, status, level):
    monkeypatch.setattr(_Hub, "status", status)
    with http.server.HTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        found = doctor.hub(5.0)
        thread.join()
    assert (found.level, str(status) in found.text) == (level, True)


def test_a_hub_that_is_not_there_is_a_note_with_a_way_out(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = doctor.hub(1.0)
    assert found.level == "note"
    assert "local folders" in found.advice


def test_a_hub_whose_address_is_none_is_a_note(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://local host:1")
    assert doctor.hub(1.0).level == "note"


def test_sizes_count_every_file_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 24)
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    assert doctor.folder_size(tmp_path) == 1024  # and not the link
    assert doctor.folder_size(tmp_path / "absent") == 0
    assert [finding.text.endswith("empty") for finding in doctor.caches()] == [True, True]


def test_the_hub_is_not_asked_where_its_client_is_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # TRANSFORMERS_OFFLINE does it, too
    assert "only local files" in doctor.hub(1.0).text


def test_of_two_disks_for_models_and_caches_the_fuller_one_is_told(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    usage = doctor.shutil.disk_usage("/")

    def free(folder):
        return usage._replace(free=10**9 if folder == tmp_path / "hub" else 10**12)

    monkeypatch.setattr(doctor.shutil, "disk_usage", free)
    assert doctor.disk().level == "problem"
    assert doctor.disk().text == f"1.0 GB free at {tmp_path / 'hub'}"


def test_a_full_disk_is_a_problem(monkeypatch):
    usage = doctor.shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.disk().level == "problem"


# What another machine would say.


def on_a_mac(monkeypatch, *, machine="arm64", macos="15.1", translated=""):
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    monkeypatch.setattr(doctor.platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    answer = doctor.subprocess.CompletedProcess([], 0, stdout=translated, stderr="")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)


def installed(monkeypatch, *names):
    monkeypatch.setattr(
        doctor.upstream, "version", lambda name: "0.32.4" if name in names else None
    )


@pytest.mark.parametrize(
    ("translated", "said", "advice"),
    [
        ("1\n", "under Rosetta", "`arch -arm64`"),
        ("", "an Intel Mac", "Apple silicon, or on Linux"),
    ],
)
def test_an_intel_python_is_a_problem_told_apart_by_rosetta(monkeypatch, translated, said, advice):
    on_a_mac(monkeypatch, machine="x86_64", translated=translated)
    installed(monkeypatch)
    (found,) = doctor.platform_of()
    assert (found.topic, found.level) == ("platform", "problem")
    assert said in found.text
    assert advice in found.advice


def test_where_sysctl_is_missing_nothing_is_said_of_rosetta(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(doctor.subprocess, "run", absent)
    assert not doctor._translated()


@pytest.mark.parametrize(("macos", "problems"), [("13.7", 1), ("14.0", 0), ("26.2", 0), ("", 0)])
def test_macos_below_14_is_a_problem(monkeypatch, macos, problems):
    on_a_mac(monkeypatch, macos=macos)
    installed(monkeypatch)
    found = doctor.platform_of()
    assert [finding.advice for finding in found] == ["Update macOS."] * problems


def test_two_backends_in_one_environment_are_a_problem_and_one_is_none(monkeypatch):
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    installed(monkeypatch, "mlx", "mlx-cuda-13")
    assert doctor.platform_of() == []
    installed(monkeypatch, "mlx", "mlx-cpu", "mlx-cuda-13")
    (found,) = doctor.platform_of()
    assert found.level == "problem"
    assert "mlx-cpu and mlx-cuda-13" in found.text
    assert "new environment" in found.advice


def test_a_version_that_nobody_tried_is_a_note_with_the_range_that_was(monkeypatch):
    untried = [
        doctor.upstream.Tested("mlx", "9.9", ">=0.32,<0.34", inside=False),
        doctor.upstream.Tested("click", "99", "<9", inside=False),
    ]
    monkeypatch.setattr(doctor.upstream, "outside", lambda: untried)
    found = by_topic(doctor.versions())
    assert found["mlx"].level == found["click"].level == "note"
    assert "9.9, which nobody tried" in found["mlx"].text
    assert "pip install 'mlx>=0.32,<0.34'" in found["mlx"].advice
    assert found["mlx-lm"].level == "ok"


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("mlx-cuda-13", "needs an NVIDIA card and its driver"),
        ("mlx-cpu", "pip install 'mlx[cpu]', or"),
    ],
)
def test_mlx_that_cannot_be_imported_says_what_is_missing(monkeypatch, package, advice):
    """A CUDA build without a driver fails where its library is loaded."""
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setitem(doctor.sys.modules, "mlx.core", None)
    installed(monkeypatch, "mlx", package)
    (found,) = doctor.device()
    assert (found.topic, found.level) == ("device", "problem")
    assert "cannot be imported" in found.text
    assert advice in found.advice


def test_a_cuda_card_is_named_with_its_own_memory(monkeypatch):
    card = {"device_name": "H100", "architecture": "sm_90", "total_memory": 80e9}
    monkeypatch.setattr(doctor.machine, "backend", lambda: "cuda")
    monkeypatch.setattr(doctor.machine, "info", lambda: card)
    found = by_topic(doctor.device())
    assert found["device"].text == "H100 through CUDA (sm_90)"
    assert found["memory"].text == "80.0 GB on the card"
