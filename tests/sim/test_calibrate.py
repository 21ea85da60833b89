"""A fit finds what made the data; wrong data is named with its line."""

import json

import pytest

from nanovllm.cli import main
from nanovllm.errors import ConfigError
from nanovllm.recording import Recorder
from nanovllm.sim.calibrate import (
    as_file,
    calibrate,
    minimize,
    read_calibration,
    read_requests,
)
from nanovllm.sim.cost import Calibration, Roofline
from nanovllm.sim.hardware import HARDWARE
from nanovllm.sim.report import Report
from nanovllm.sim.run import Engine, simulate
from nanovllm.sim.shape import SHAPES
from nanovllm.sim.steps import StepTimes
from nanovllm.sim.workload import Synthetic, make_workload
from tests.core.fakes import Rig

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


STEPS = StepTimes(0.01, 1e-4, 2e-4, 1e-6, 2e-6, (1e-3, 2e-3), (0, 8))


@pytest.mark.parametrize("fitted", [Calibration(0.7, 0.8, 0.002), STEPS])
def test_a_calibration_of_either_form_is_read_as_it_was_written(fitted, tmp_path):
    file = tmp_path / "fit.json"
    file.write_text(json.dumps({**as_file(fitted), "errors": {}}))
    assert read_calibration(str(file)) == fitted


def test_a_calibration_that_names_no_form_is_a_roofline(tmp_path):
    file = tmp_path / "fit.json"
    file.write_text(json.dumps(Calibration().as_dict()))
    assert read_calibration(str(file)) == Calibration()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"form": "tea leaves"}',
        '{"form": []}',
        '{"form": "steps"}',
        json.dumps(Calibration().as_dict() | {"overhead_s": -1.0}),
        json.dumps(as_file(STEPS) | {"pair_s": -1.0}),
        json.dumps(as_file(STEPS) | {"pair_s": "x"}),
        json.dumps(as_file(STEPS) | {"pair_s": float("nan")}),
        json.dumps(as_file(STEPS) | {"token_s": 1}),
        json.dumps(as_file(STEPS) | {"token_s": [1e-3]}),
        json.dumps(as_file(STEPS) | {"edges": [0, "x"]}),
    ],
)
def test_junk_is_no_calibration(text, tmp_path):
    file = tmp_path / "fit.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="no file that `nanovllm calibrate` wrote"):
        read_calibration(str(file))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Of an engine whose steps take 10 ms, and 1 ms for each token."""
    rig = Rig(num_blocks=99, max_num_seqs=4)
    path = tmp_path_factory.mktemp("recording") / "r.jsonl"
    execute = rig.executor.execute

    def slow(plan):
        rig.now_s += 0.01 + 1e-3 * sum(plan.num_scheduled_tokens)
        return execute(plan)

    rig.executor.execute = slow
    recorder = Recorder(rig.engine, str(path))
    for i in range(12):
        rig.add([i] * (5 + 3 * i), max_tokens=3 + i)
    rig.run()
    recorder.close()
    return str(path)


def test_a_recording_is_fitted_and_simulated(recording, tmp_path, capsys):
    fit, report, trace = (str(tmp_path / name) for name in ("fit", "report", "trace"))
    assert main(["calibrate", "--recording", recording, "-o", fit, "--hardware", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "decode only" in shown and "with prefill" in shown
    found = json.loads((tmp_path / "fit").read_text())
    assert (found["form"], found["num_kv_blocks"]) == ("steps", 99)
    assert max(map(abs, found["errors"].values())) < 0.01
    (tmp_path / "trace").write_text('{"arrival_s": 0, "prompt_tokens": 20, "output_tokens": 2}\n')
    words = ["--workload", trace, "--calibration", fit, "--hardware", "cpu"]
    assert main(["simulate", *words, "--model", "smollm2-135m", "--json", report]) == 0
    result = json.loads((tmp_path / "report").read_text())
    assert result["ttft_ms"]["mean"] == pytest.approx(30, rel=0.02)
    assert result["tpot_ms"]["mean"] == pytest.approx(11, rel=0.02)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-o", "fit"], "requests=None: name a file, or a recording"),
        (["--recording", "r"], "output=None: name a file"),
        (["--recording", "r", "--requests", "q", "-o", "fit"], "give either this or requests"),
        (["--recording", "/nowhere/r", "-o", "fit"], "cannot be read"),
    ],
)
def test_what_a_fit_lacks_is_said_and_nothing_is_written(words, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *words]) == 2
    assert why in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_least_of_a_bowl():
    value, point = minimize(lambda x: (x[0] - 0.3) ** 2 + 2 * (x[1] + 0.1) ** 2, [0.0, 0.0], 200)
    assert value < 1e-4
    assert point == pytest.approx([0.3, -0.1], abs=0.01)
