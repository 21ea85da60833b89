"""benchmarks/sim_accuracy.py on recordings of an engine whose steps take what they are said to."""

from pathlib import Path

import pytest

from benchmarks.sim_accuracy import FIRST, METRICS, Run, compare, report_of, table, workload
from nanovllm.core.plan import StepPlan, StepResult
from nanovllm.recording import Recorder, read_recording
from nanovllm.sampling_params import SamplingParams
from nanovllm.sim.cost import Work
from nanovllm.sim.run import Engine, simulate
from tests.core.fakes import Rig

RUNS = {
    FIRST: Run(workload(20.0, 60, 30, 10), 0),
    "rate": Run(workload(40.0, 40, 30, 10), 1),
    "policy": Run(workload(50.0, 40, 30, 10), 2, 3, "prefill-first"),
}


class TenAndOne:
    """A step takes 10 ms, and 1 ms for each token."""

    def step_s(self, work: Work) -> float:
        return 0.01 + 1e-3 * work.num_tokens


def serve(run: Run, path: Path) -> None:
    """A recorded run, on a clock that only steps move."""
    rig = Rig(num_blocks=999, max_num_seqs=run.max_num_seqs, policy=run.scheduling_policy)
    execute = rig.executor.execute

    def slow(plan: StepPlan) -> StepResult:
        rig.now_s += 0.01 + 1e-3 * sum(plan.num_scheduled_tokens)
        return execute(plan)

    rig.executor.execute = slow
    rig.now_s = 5.0
    recorder, waiting = Recorder(rig.engine, str(path)), run.requests()
    while waiting or rig.engine.has_unfinished:
        while waiting and 5.0 + waiting[0].arrival_s <= rig.now_s:
            one = waiting.pop(0)
            params = SamplingParams(max_tokens=one.num_output_tokens, ignore_eos=True)
            rig.engine.add([100 + len(waiting)] * one.num_prompt_tokens, params)
        if rig.engine.has_unfinished:
            rig.engine.step()
        elif waiting:
            rig.now_s = 5.0 + waiting[0].arrival_s
    recorder.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recordings")
    for name, run in RUNS.items():
        serve(run, made / (f"{name}.jsonl" if name == FIRST else f"{name}-1.jsonl"))
    return made


@pytest.mark.parametrize("name", ["rate", "policy"])
def test_a_live_report_is_that_of_a_simulation_with_the_true_times(name: str, folder: Path) -> None:
    run = RUNS[name]
    live = report_of(list(read_recording(str(folder / f"{name}-1.jsonl"))), run.requests())
    engine = Engine(
        num_kv_blocks=999,
        block_size=4,
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=64,
        scheduling_policy=run.scheduling_policy,
    )
    simulated = simulate(run.requests(), engine, TenAndOne()).result()
    for key in ("num_finished", "output_throughput", "total_token_throughput", "duration_s"):
        assert live[key] == pytest.approx(simulated[key])
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "queue_ms"):
        assert live[key] == pytest.approx(simulated[key])


def test_what_is_predicted_from_one_run_is_what_the_others_do(folder: Path) -> None:
    result = compare(folder, RUNS, 1)
    assert set(result["runs"]) == set(RUNS)
    for run in result["runs"].values():
        assert {metric: round(row["error"], 2) for metric, row in run["metrics"].items()} == (
            dict.fromkeys(METRICS, 0.0)
        )
    assert "beyond" not in table(result)
