"""A fit finds what made the data; wrong data is named with its line."""

import json

import pytest

from nanovllm.errors import ConfigError
from nanovllm.sim.calibrate import calibrate, minimize, read_requests
from nanovllm.sim.cost import Calibration, Roofline
from nanovllm.sim.hardware import HARDWARE
from nanovllm.sim.report import Report
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.shape import SHAPES
from nanovllm.sim.workload import Synthetic, make_workload

ROW = {
    "input_toks": 9,
    "output_toks": 3,
    "queued_ts": 5.0,
    "first_token_ts": 6.0,
    "last_token_ts": 8.0,
}


class Kept(Report):
    """Keeps what it counts."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def add(self, one):
        super().add(one)
        self.rows.append(one)


def test_a_calibration_is_found_again(tmp_path):
    engine = Engine(num_kv_blocks=2588, enable_prefix_caching=False)
    device, shape = HARDWARE["rtx4090"], SHAPES["llama-3.1-8b"]
    truth = Calibration(0.7, 0.8, 0.002)
    kept = Kept()
    workload = make_workload(
        Synthetic(num_requests=40, request_rate=20, output_tokens=16, prompt_tokens=900), 0
    )
    simulate(workload, engine, Roofline(device, shape, 1, truth), kept)
    rows = [
        {
            "input_toks": row.num_prompt_tokens,
            "output_toks": row.num_output_tokens,
            "queued_ts": row.arrival_s,
            "first_token_ts": row.first_token_s,
            "last_token_ts": row.last_token_s,
        }
        for row in kept.rows
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    measured = read_requests(str(file))
    fitted, left = calibrate(measured, engine, device, shape)
    assert fitted.compute_efficiency == pytest.approx(0.7, rel=0.05)
    assert max(map(abs, left.values())) < 0.01
    assert calibrate(measured, engine, device, shape) == (fitted, left)


def test_a_request_file_becomes_a_workload_and_a_report(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    measured = read_requests(str(file))
    assert [(one.arrival_s, one.num_prompt_tokens) for one in measured.requests] == [(0.0, 9)]
    assert measured.report["ttft_ms"]["mean"] == measured.report["tpot_ms"]["mean"] == 1000


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no requests"),
        ("[1]", "line 1: list indices"),
        (json.dumps(ROW) + "\n{}\n", "line 2 has no queued_ts"),
        (json.dumps(ROW | {"input_toks": 0}), "line 1: prompt and output"),
        (json.dumps(ROW | {"last_token_ts": 1}), "line 1: its times are not in order"),
        (json.dumps(ROW) + "\n\n{nonsense", "line 3: Expecting property name"),
    ],
)
def test_a_wrong_line_is_named(text, why, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_requests(str(file))
    assert why in str(error.value)


def test_the_least_of_a_bowl():
    value, point = minimize(lambda x: (x[0] - 0.3) ** 2 + 2 * (x[1] + 0.1) ** 2, [0.0, 0.0], 200)
    assert value < 1e-4
    assert point == pytest.approx([0.3, -0.1], abs=0.01)
