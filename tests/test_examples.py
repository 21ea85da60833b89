"""The examples that need no model, made small."""

from pathlib import Path

from examples.study import SETTINGS, conclusion, draw, most, study


def test_the_study_finds_that_small_chunks_and_priority_keep_the_targets(tmp_path: Path) -> None:
    runs = study((0.3, 0.9), num_seeds=1, duration_s=12.0)
    assert list(runs) == [(setting, rate) for setting in SETTINGS for rate in (0.3, 0.9)]
    assert most(runs, ("priority", 512)) == 0.9
    assert most(runs, ("fcfs", 512)) == 0.0
    assert "Take priority with chunks of 512 tokens, for up to 0.9 documents" in conclusion(runs)
    draw(runs, tmp_path / "study.svg")
    picture = (tmp_path / "study.svg").read_text()
    assert picture.count("chunks of") == 2 * len(SETTINGS)
    assert "target: 500 ms" in picture
