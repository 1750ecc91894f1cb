"""Several processes: the same numbers as one, replicated or sharded, on gloo; and what happens when one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from rank_runs import RUNS, STOPS  # noqa: E402

LAYOUTS = ["ddp", "fsdp"]
QUICK = ("dpo", "tied", "idle", "rows", "few prompts", "reward", "lora")  # whose runs are not left out with QUICK=1


@pytest.fixture(scope="module")
def results(repo_root, preloaded, once):
    """results[case][layout]: what a run of tests/rank_runs.py left, which begins when a test first asks for it."""

    class Layouts(dict):
        def __init__(self, case):
            self.case = case

        def __missing__(self, layout):
            def run(folder):
                done = preloaded.run(repo_root / "tests" / "rank_runs.py", folder, self.case, layout)
                assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

            name = f"rank runs, {self.case}, {layout}"
            self[layout] = torch.load(once(name, run) / "run.pt", weights_only=True)
            return self[layout]

    class Cases(dict):
        def __missing__(self, case):
            return self.setdefault(case, Layouts(case))

    return Cases()


def distance(a, b) -> float:
    assert a["weights"].keys() == b["weights"].keys()
    return max((a["weights"][n].double() - b["weights"][n].double()).abs().max().item() for n in a["weights"])


def assert_same_log(a, b, rel):
    assert len(a["logs"]) == len(b["logs"])
    for x, y in zip(a["logs"], b["logs"]):
        assert x.keys() == y.keys()
        for key in x:
            if key not in ("packing_efficiency", "shared_prompt_savings", "mfu"):  # a rank's own
                assert x[key] == pytest.approx(y[key], rel=rel, abs=rel), (key, x["step"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)
     for case in ("dpo", "tied", "idle", "tr-dpo", "inpo", "orpo", "rows", "all pairs", "lists", "kto", "bco", "aot",
                  "checkpointing", "few prompts", "named", "reward")],
)  # fmt: skip
def test_ranks_change_nothing(results, case, layout):
    """SGD in fp32: every logged number, evaluations included, and the final weights."""
    one, several = results[case]["one"], results[case][layout]
    assert distance(one, several) < 1e-6
    assert_same_log(one, several, rel=2e-5)
    # something was learned, and the last step of an epoch was short
    assert one["logs"][0]["loss"] != pytest.approx(one["logs"][-2].get("loss", 0.0), rel=1e-3)


@pytest.mark.parametrize("case", ["tdpo", "tdpo lora", "degrees"])
def test_what_is_whole_on_every_rank(results, case):
    """A reference in memory; a head beside the model."""
    assert distance(results[case]["one"], results[case]["ddp"]) < 1e-6
    assert_same_log(results[case]["one"], results[case]["ddp"], rel=2e-5)


@pytest.mark.parametrize("layout", ["ddp accumulating", "fsdp on four", "shard_grad_op", "offload", "micro_batch"])
def test_other_layouts_change_nothing(results, layout):
    assert distance(results["dpo"]["one"], results["dpo"][layout]) < 1e-6
    assert_same_log(results["dpo"]["one"], results["dpo"][layout], rel=2e-5)


def test_layers_that_stay_gathered_follow_the_moving_reference(results):
    assert distance(results["tr-dpo"]["one"], results["tr-dpo"]["shard_grad_op"]) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case, allowed", [("lora", 2e-4), ("bf16", 2.0**-5)])
def test_adapters_and_16_bits_agree_within_rounding(results, case, layout, allowed):
    """AdamW divides by the gradient's size, so rounding shows at full learning rate where that is near zero."""
    one, several = results[case]["one"], results[case][layout]
    assert distance(one, several) < allowed
    assert_same_log(one, several, rel=1e-3 if case == "lora" else 0.05)


def test_every_evaluation_counts_every_pair_once(results):
    one, several = results["dpo"]["one"]["logs"], results["dpo"]["fsdp"]["logs"]
    for prefix in ("eval_a", "eval_b"):  # five pairs, and one pair on two ranks
        x = [line[f"{prefix}_loss"] for line in one if f"{prefix}_loss" in line]
        y = [line[f"{prefix}_loss"] for line in several if f"{prefix}_loss" in line]
        assert len(x) == 2 and x == pytest.approx(y, rel=1e-5)


@pytest.mark.parametrize(
    "case, layout",
    [pytest.param(*run, id=", ".join(run), marks=[] if run[0] in QUICK else pytest.mark.slow) for run in RUNS],
)
def test_what_is_saved_is_the_model(results, case, layout):
    """Gathered from shards, tied, adapter or in 16 bits: `from_pretrained` reads what training ended with."""
    assert results[case][layout]["saved"]


def test_a_rank_holds_its_share(results):
    whole = results["dpo"]["one"]["local"]
    assert results["dpo"]["ddp"]["local"] == whole
    assert whole / 2 <= results["dpo"]["fsdp"]["local"] < whole / 2 * 1.05
    assert whole / 4 <= results["dpo"]["fsdp on four"]["local"] < whole / 4 * 1.1


def test_one_gather_of_the_head_a_micro_batch_and_one_reduction_a_step(results):
    counted = results["dpo"]["counted"]
    calls, steps, groups = counted["calls"], 6, 3  # two layers and the root
    assert calls["passes with gradient"] > 2 * steps  # several micro-batches a step
    assert calls["root gathers"] == calls["passes with gradient"]
    assert calls["reductions"] == steps * groups
    assert distance(results["dpo"]["one"], counted) < 1e-6


@pytest.mark.parametrize("layout, event, step", STOPS)
def test_a_callback_that_stops_one_rank_stops_all(results, layout, event, step):
    """In whatever event it decides: ranks that part would wait for each other until the time-out."""
    logs = results["dpo"][f"{layout} stopped in {event} at {step}"]["logs"]
    assert [line["step"] for line in logs if "grad_norm" in line] == [*range(1, step + 1)]


@pytest.mark.parametrize("change", ["fsdp to one", "one to fsdp", "fsdp to ddp", "ddp to shard_grad_op"])
def test_a_checkpoint_resumes_on_another_number_of_ranks(results, change):
    """Same rows, same moments: what remains is the rounding of sums over ranks, through AdamW."""
    assert distance(results["dpo"]["adam"], results["dpo"][change]) < 1e-4
    assert_same_log(results["dpo"]["adam"], results["dpo"][change], rel=1e-3)


# ---- torchrun


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    toy.model().save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in toy.rows(16)))
    return folder


def torchrun(saved, output, *options, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone",
               "-m", "fastpo", "train", "--model", str(saved), "--train-dataset", str(saved / "pairs.jsonl"),
               "--output-dir", str(output), "--use-cpu", "--no-bf16", "--disable-tqdm", *options]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.mark.slow
def test_torchrun_trains_and_a_dead_rank_stops_the_others(saved, tmp_path):
    """SIGKILL of one rank: the launcher stops the other within a minute, the checkpoint stands, and is resumed."""
    out = tmp_path / "run"
    options = ["--max-steps", "4000", "--save-steps", "2", "--save-total-limit", "2", "--fsdp", "full_shard",
               "--per-device-train-batch-size", "2", "--no-report"]  # fmt: skip
    process = torchrun(saved, out, *options)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert list(out.glob("checkpoint-*")), process.communicate()[0][-3000:]
    ranks = subprocess.run(["pgrep", "-f", f"fastpo train .*--output-dir {out}"], capture_output=True, text=True)
    pids = [int(p) for p in ranks.stdout.split() if int(p) != process.pid]
    os.kill(pids[-1], signal.SIGKILL)
    began = time.monotonic()
    text = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert "SIGKILL" in text or "exitcode" in text
    process = torchrun(saved, out, *options, "--resume-from-checkpoint", "auto", "--max-steps", "12", processes=2)
    text = process.communicate(timeout=180)[0]
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert process.returncode == 0 and last["step"] >= 12, text[-3000:]
    assert (out / "model.safetensors").exists()


def test_a_mistake_is_said_by_one_rank_and_ends_all(saved, tmp_path):
    process = torchrun(saved, tmp_path / "run", "--max-length", "1")
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    said = [line for line in text.splitlines() if "max_length" in line]
    assert said and all(line.startswith("fastpo") for line in said), text
    assert "fastpo/trainer.py" not in text  # torchrun's own traceback is all there is


def test_a_taken_port_is_named(saved, preloaded, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = preloaded.run(
            "-m", "fastpo", "train", "--model", saved, "--train-dataset", saved / "pairs.jsonl",
            "--output-dir", tmp_path / "run", "--use-cpu", "--ddp-timeout", 20, timeout=120,
            env={"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )  # fmt: skip
    assert done.returncode == 2 and "is the port taken?" in done.stderr and "Traceback" not in done.stderr


def test_fsdp_needs_several_processes(toy, tmp_path):
    import fastpo
    from fastpo.errors import ConfigError

    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        fastpo.train(toy.model(), toy.rows(4), processing_class=toy.tokenizer(), output_dir=str(tmp_path / "run"),
                     use_cpu=True, fsdp="full_shard")  # fmt: skip
