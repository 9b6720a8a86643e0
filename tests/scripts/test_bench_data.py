"""The measurement of large sets runs to its end on a small one."""

from __future__ import annotations

import bench_data
import tiny_models
from launchers import environment


def test_train_begins_from_the_made_up_scores_without_a_reference_pass(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", environment(torch=False)["PYTHONPATH"])
    tiny_models.tiny_llama(tmp_path / "tiny", tokenizer=True)
    work = ["--work", str(tmp_path / "work"), "--tokenizer", str(tmp_path / "tiny")]
    bench_data.main([*work, "--pairs", "6", "--commands", "train", "--runs", "1"])
    assert capsys.readouterr().out.rstrip().endswith("rc 0")
    log = (tmp_path / "work" / "train.log").read_text()
    assert "scoring" not in log
    assert "training" in log
