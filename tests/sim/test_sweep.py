"""Grids over the same workloads: rows, differences, the frontier, on any number of processes."""

import pytest

from nanovllm.errors import ConfigError
from nanovllm.sim.experiment import Load, Point, measure, run_all
from nanovllm.sim.sweep import against, as_json, deployments, frontier, sweep, table
from nanovllm.sim.workload import Synthetic

SMALL = Load(
    synthetic=Synthetic(num_requests=20, prompt_tokens=64, output_tokens=8), ttft_target_s=0.2
)
GRID = {"hardware": ["l4", "h100"], "max_num_seqs": [1, 64]}


def grid(**more):
    candidates = deployments(GRID, {"model": "qwen3-0.6b", "num_kv_blocks": 1000})
    return sweep(candidates, GRID, SMALL, (4.0, 64.0), range(2), {"l4": 0.5, "h100": 2.0}, **more)


def double(number):
    return 2 * number


def test_the_frontier_is_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 5.0), (3.0, 9.0), (3.0, 8.0), (2.5, 9.0), (2.0, 5.0)]
    assert frontier(points) == [1, 3]
    assert frontier([]) == []


def test_results_keep_their_order_and_progress_is_told():
    told = []
    assert run_all(double, range(5), 1, told.append) == [0, 2, 4, 6, 8]
    assert told == [1] * 5


def test_a_grid_is_the_same_on_one_process_and_on_two():
    alone, told = grid(), []
    assert grid(num_workers=2, progress=told.append) == alone
    assert len(told) == 16
    assert [row.setting for row in alone[:3]] == [
        {"hardware": "l4", "max_num_seqs": 1, "request_rate": 4.0},
        {"hardware": "l4", "max_num_seqs": 1, "request_rate": 64.0},
        {"hardware": "l4", "max_num_seqs": 64, "request_rate": 4.0},
    ]
    assert all(len(row.reports) == 2 and row.error is None for row in alone)


def test_rows_are_compared_to_the_first_setting_under_the_same_load():
    rows = grid()
    assert against(rows, rows[0], "ttft_ms_p99") is None
    base, other = rows[1].values("ttft_ms_p99"), rows[3].values("ttft_ms_p99")
    shares = [b / a - 1 for a, b in zip(base, other, strict=True)]
    assert against(rows, rows[3], "ttft_ms_p99").mean == pytest.approx(sum(shares) / 2)
    found = as_json(rows, range(2), {"workload": "w"})
    assert set(found) == {"workload", "points", "summary"}
    assert len(found["points"]) == 16
    assert set(found["points"][0]) == {"setting", "seed", "report", "error"}
    assert found["summary"][0]["against_first"]["ttft_ms_p99"] is None


def test_what_cannot_run_is_a_row_that_says_why():
    candidates = deployments({"hardware": ["l4", "h200"]}, {"model": "llama-3.1-70b"})
    rows = sweep(candidates, ["hardware"], SMALL)
    assert rows[0].reports == []
    assert "take larger devices or more" in rows[0].error
    assert "141.1 GB of weights" in rows[1].error
    text = table(rows)
    assert text.count("cannot run") == 2
    [first, second] = as_json(rows, [0], {})["points"]
    assert first["report"] is second["report"] is None


def test_names_are_checked_before_anything_runs():
    with pytest.raises(ConfigError, match="choose one of rtx4090"):
        deployments({"hardware": ["l4", "abacus"]}, {})
    with pytest.raises(ConfigError, match="a trace is served once"):
        sweep(deployments({}, {}), [], Load(workload="trace.csv"), seeds=range(2))


def test_requests_go_to_replicas_in_turn(tmp_path):
    """Ten equal requests at once to engines of one sequence: half as many wait at each of two."""
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 8, "output_tokens": 4}\n' * 10)
    [deployment] = deployments({}, {"max_num_seqs": 1, "num_kv_blocks": 64})
    load = Load(workload=str(trace))
    one, two = (
        measure(Point(deployment=deployment, load=load, num_replicas=n, price_per_hour=3.0))
        for n in (1, 2)
    )
    assert one["num_finished"] == two["num_finished"] == 10
    assert two["duration_s"] == pytest.approx(one["duration_s"] / 2, rel=1e-3)
    assert two["cost_per_million_tokens"] == pytest.approx(one["cost_per_million_tokens"], rel=1e-3)
