"""The doctor says what is there and what is wrong, without a network and without raising."""

import http.server
import threading

import mlx.core as mx
import pytest

from fpo_mlx.machine import blas
from fpo_mlx.pipeline import doctor


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "fpo"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
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
    assert (found.level, found.advice) == ("problem", "pip install no-such-package")


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


def test_apple_silicon_shows_its_memory_and_its_wired_limit(monkeypatch):
    info = {"device_name": "M9", "memory_size": 16e9, "max_recommended_working_set_size": 10.7e9}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    found = by_topic(doctor.device())
    assert found["memory"].text == "16.0 GB unified"
    assert "10.7 GB of 16.0 GB" in found["wired limit"].text
    assert "iogpu.wired_limit_mb=12207" in found["wired limit"].advice  # 0.8 * 16e9 / 2**20
    info["max_recommended_working_set_size"] = 12e9
    assert by_topic(doctor.device())["wired limit"].level == "ok"


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


def test_a_full_disk_is_a_problem(monkeypatch):
    usage = doctor.shutil.disk_usage("/")._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.disk().level == "problem"
