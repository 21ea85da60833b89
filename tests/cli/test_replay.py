"""`nanovllm replay` from its command line."""

import json

import pytest

from nanovllm.cli import main
from nanovllm.recording import Header, read_recording
from tests.core.fakes import Rig
from tests.test_recording import recorded


@pytest.fixture
def scarce(tmp_path):
    """Three requests of which the middle one is preempted, half a second a step."""
    path = tmp_path / "scarce.jsonl"
    rig = Rig(num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=12)
    recorder = recorded(path, rig)
    for name, prompt in {"one": [1] * 8, "two": [2] * 8, "three": [1] * 9}.items():
        rig.add(prompt, max_tokens=6, request_id=name)
    rig.run()
    recorder.close()
    return str(path)


def test_three_reports_side_by_side(scarce, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("json", "events", "record")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    changes = ["--num-kv-blocks", "64", "--max-num-seqs", "4"]
    assert main(["replay", scarce, *changes, *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["recorded", "modelled", "error", "replayed", "change"]
    assert said[1].split() == ["num_finished", "3", "3", "0", "3", "0"]
    assert [line.split() for line in said if line.startswith("num_preempt")] == [
        ["num_preemptions", "2", "2", "0", "0", "-100.0%"]
    ]
    assert said[-2:] == [
        "One recording: no interval.",
        "Steps of up to 3 sequences; the recording knows up to 2: the rest is extrapolated.",
    ]
    found = json.loads(files["json"].read_text())
    assert list(found) == ["recorded", "modelled", "replayed"]
    assert found["recorded"].keys() == found["replayed"].keys()
    assert json.loads(files["events"].read_text().splitlines()[0])["kind"] == "added"
    assert main(["explain", str(files["record"])]) == 0
    header = next(read_recording(str(files["record"])))
    assert isinstance(header, Header)
    assert (header.num_blocks, header.max_num_seqs) == (64, 4)


def test_nothing_changed_is_the_same(scarce, capsys):
    assert main(["replay", scarce]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert {line.split()[-1] for line in lines} == {"0"}


def test_another_policy_is_named(scarce, tmp_path):
    file = tmp_path / "again"
    assert main(["replay", scarce, "--scheduling-policy", "sjf", "--record", str(file)]) == 0
    assert next(read_recording(str(file))).policy.endswith(":ShortestJobFirst")


def test_other_hardware_takes_its_own_times_and_blocks(scarce, tmp_path, capsys):
    file = tmp_path / "again"
    words = ["--hardware", "h100", "--model", "qwen3-0.6b", "--record", str(file)]
    assert main(["replay", scarce, *words]) == 0
    assert "Step times are the data sheet's" in capsys.readouterr().out
    assert next(read_recording(str(file))).num_blocks > 100_000


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["{folder}/none"], "cannot be read: No such file"),
        (["{folder}/bad"], "line 2"),
        (["{folder}/header"], "has no requests"),
        (["{scarce}", "--model", "qwen3-0.6b"], "add hardware"),
        (["{scarce}", "--hardware", "h100", "--model", "none-such"], "name a config.json"),
        (["{scarce}", "--hardware", "abacus", "--model", "qwen3-0.6b"], "choose one of"),
        (["{scarce}", "--scheduling-policy", "nonsense"], "scheduling_policy"),
        (["{scarce}", "--max-num-seqs", "13"], "each of max_num_seqs=13 needs a token"),
        (["{scarce}", "--calibration", "{folder}/bad"], "no file that `nanovllm calibrate`"),
        (["{scarce}", "--json", "{folder}/no/such"], "in a folder that exists"),
    ],
)
def test_what_is_impossible_is_said_and_nothing_is_written(words, why, scarce, tmp_path, capsys):
    header = open(scarce, encoding="utf-8").readline()  # noqa: SIM115
    (tmp_path / "header").write_text(header)
    (tmp_path / "bad").write_text(header + "{}\n")
    before = sorted(file.name for file in tmp_path.iterdir())
    words = [word.format(folder=tmp_path, scarce=scarce) for word in words]
    assert main(["replay", *words, "--record", str(tmp_path / "again")]) == 2
    assert why in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == before
