"""bench/gpu.sh: limits, signals, the archive, wheels, and that every section's command is one."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"
# What the rented image lacks.
ABSENT = ("datasets", "trl", "liger_kernel", "cut_cross_entropy", "quack", "flash_attn", "bitsandbytes", "matplotlib",
          "xdist", "scipy", "sklearn", "pandas", "pyarrow")  # fmt: skip


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_run")


def start(tmp_path: Path, body: str, *, part: str = "run", limit: float = 60.0) -> subprocess.Popen:
    """A run of made-up sections in a process of its own, its archive in tmp_path/out."""
    text = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu_run
gpu_run.GRACE_S = 1.0
run = gpu_run.Run(Path({str(tmp_path / "out")!r}), {part!r}, {limit}, {{}}, reserve=1.0)

def python(name, limit, code):
    return gpu_run.Section(name, limit, [sys.executable, "-c", "import os, signal, subprocess, sys, time\\n" + code])

try:
{body}
finally:
    code = run.finish()
sys.exit(code)
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def unpacked(folder: Path) -> dict[str, str]:
    """File name -> text of the one archive in a folder, with nothing beside it."""
    assert [path.name for path in folder.iterdir()] == ["gpu.tar.gz"]
    with tarfile.open(folder / "gpu.tar.gz") as archive:
        return {m.name: archive.extractfile(m).read().decode(errors="replace") for m in archive.getmembers()}


def states(files: dict[str, str]) -> dict[str, str]:
    return {section["name"]: section["state"] for section in json.loads(files["run/gpu.json"])["sections"]}


def gone(pid: int) -> bool:
    """Whether a process has ended, or will as soon as somebody asks for its exit code."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_each_section_within_its_time(tmp_path):
    deaf = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN); p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True)"
    )
    body = f"""
    code = f"print('fine'); open({{str(run.folder / 'ops.json')!r}}, 'w').write('[1]')"
    run.stage([
        python("good", 20, code),
        python("fails", 20, "print('ValueError: no such kernel'); print('afterwards'); sys.exit(3)"),
        python("slow", 6, "sys.stdout.write('half a line'); sys.stdout.flush(); time.sleep(300)"),
        python("deaf", 6, {deaf + "; time.sleep(300)"!r}),
        gpu_run.Section("absent", 20, ["/no/such/program"]),
    ])
    run.stage([python("next", 20, "print('ran')")])
    run.reserve = run.limit
    run.stage([python("late", 20, "print('ran')")])
"""
    begin = time.monotonic()
    process = start(tmp_path, body)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - begin < 40, out
    files = unpacked(tmp_path / "out")
    assert states(files) == {
        "good": "ok", "fails": "exit code 3", "slow": "cut off", "deaf": "cut off", "absent": "could not start",
        "next": "ok", "late": "no time left",
    }  # fmt: skip
    assert set(files) == {"run/gpu.json", "run/ops.json"} | {
        f"run/logs/{name}.log" for name in ("good", "fails", "slow", "deaf", "absent", "next")
    }
    assert files["run/ops.json"] == "[1]" and "No such file" in files["run/logs/absent.log"]
    # SIGINT comes first: a script that is cut off says where it was.
    assert files["run/logs/slow.log"].startswith("half a line") and "KeyboardInterrupt" in files["run/logs/slow.log"]
    assert gone(int(files["run/logs/deaf.log"].split()[0]))
    assert "good | fine" in out and "fails | afterwards" in out
    assert re.findall(r"^did not succeed: (\w+) ", out, re.MULTILINE) == ["fails", "slow", "deaf", "absent", "late"]
    assert "did not succeed: fails (exit code 3): ValueError: no such kernel" in out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the temporary folder is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_leaves_the_archive(tmp_path, number):
    body = """
    run.stage([python("done", 20, "print('one')")])
    run.stage([python("sleeper", 50, "print(os.getpid(), flush=True); time.sleep(300)")])
    run.stage([python("never", 50, "print('no')")])
"""
    process = start(tmp_path, body)
    for line in process.stdout:  # streamed: it is there while the section runs
        if found := re.match(r"sleeper \| (\d+)$", line):
            break
    assert found and states(unpacked(tmp_path / "out")) == {"done": "ok"}  # what SIGKILL would leave
    process.send_signal(number)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number, out
    files = unpacked(tmp_path / "out")
    assert states(files) == {"done": "ok", "sleeper": "stopped", "never": "stopped"}
    assert json.loads(files["run/gpu.json"])["signal"] == number.name
    assert files["run/logs/sleeper.log"].startswith(found[1]) and gone(int(found[1]))


def test_what_sigkill_does_not_end_holds_nothing_up(gpu_run, tmp_path, monkeypatch):
    """A process that waits in a driver: played by one whose signals get lost."""
    monkeypatch.setattr(gpu_run, "GRACE_S", 0.2)
    run = gpu_run.Run.__new__(gpu_run.Run)  # without handlers of signals in this process
    monkeypatch.setattr(gpu_run.Run, "_conclude", lambda self, item: None)
    run.stopped = 0
    section = gpu_run.Section("hangs", 0.1, ["sleep", "300"])
    item = gpu_run.Running(section, tmp_path / "hangs.log", 0.1, dict(os.environ))
    monkeypatch.setattr(item, "_signal", lambda number: None)
    try:
        run._watch([item])
    finally:
        item.process.kill()
        item.process.wait()
    assert section.state == "cut off, and does not end" and section.seconds < 30


def test_both_halves_in_one_archive(tmp_path):
    def run(part, name):
        body = f'    run.stage([python({name!r}, 20, "print({name!r})")])\n'
        process = start(tmp_path, body, part=part)
        out = process.communicate(timeout=30)[0]
        assert process.returncode == 0, out
        return out

    run("run", "env")
    run("train", "train")
    run("run", "check")  # nothing of an earlier run of the same half is taken for one of this
    files = unpacked(tmp_path / "out")
    assert set(files) == {"run/gpu.json", "run/logs/check.log", "train/gpu_train.json", "train/logs/train.log"}
    archive = tmp_path / "out" / "gpu.tar.gz"
    archive.write_bytes(archive.read_bytes()[:100])
    assert "is no whole archive" in run("run", "env")
    (tmp_path / "out" / "gpu.tar.gz.damaged").unlink()
    assert set(unpacked(tmp_path / "out")) == {"run/gpu.json", "run/logs/env.log"}


def test_wrong_options_and_no_time(tmp_path):
    def run(*options):
        command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), *options]
        environment = os.environ | {"PYTHON": sys.executable}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)

    for options, text in (
        (("--fast",), "--fast"),
        (("--device", "cpu"), "--device cpu goes with --tiny"),
        (("--only", "kernel"), "no section 'kernel'; one of env, check"),
        (("--wheels", "nowhere"), "nowhere is no folder"),
    ):
        done = run(*options)
        assert done.returncode == 2 and text in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    done = run("--device", "cpu", "--tiny", "--limit", "0")  # not even what is reserved
    assert done.returncode == 1
    assert done.stdout.count("no time left") == 2 * done.stdout.count("did not succeed") > 0
    assert set(states(unpacked(tmp_path / "out")).values()) == {"no time left"}


def arguments(**more) -> Namespace:
    return Namespace(**{"device": "cuda", "tiny": False, "train": False, "wheels": None, "steps": 4,
                        "scenario": ["1b_full_1024_256", "1b_lora_64_512", "8b_lora_1024_256"]} | more)  # fmt: skip


def test_the_plan(gpu_run, tmp_path, monkeypatch):
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
              if re.search(r"mark\.gpu\b", path.read_text()) and path != Path(__file__)}  # fmt: skip
    assert marked == set(gpu_run.GPU_TESTS)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for train in (False, True):
        stages, closing = gpu_run.plan(arguments(train=train, wheels=tmp_path), tmp_path, tmp_path)
        names = [section.name for stage in stages for section in stage]
        assert len(set(names)) == len(names) and names[0] == "wheels"
        one_by_one = [stage[0].name for stage in stages if len(stage) == 1]
        if train:
            assert one_by_one == ["wheels", "attention", "train"] and not closing
            continue
        assert one_by_one == ["wheels", "kernels", "ours", "goals", "ops", "losses", "sweep"]
        assert [section.name for stage in closing for section in stage] == ["goals_peers", "report"]
        # Wheels may change what our own figures run on (an attention kernel): they are not on the path of those.
        assert not any(s.peers for stage in stages for s in stage if s.name in ("check", "kernels", "ours", "goals"))
        shards = [s for stage in stages for s in stage if s.name.startswith("tests_")]
        assert [s.environment["FASTPO_TEST_SHARD"] for s in shards] == [f"{i}/6" for i in range(1, 7)]


def test_shards_are_a_partition(tmp_path):
    for name in ("conftest.py", "preloaded.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(40))\ndef test_one(i): pass\n"
    )
    found = []
    for shard in ("1/3", "2/3", "3/3"):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "test_some.py"],
            cwd=tmp_path, env=os.environ | {"FASTPO_TEST_SHARD": shard}, capture_output=True, text=True,
        )  # fmt: skip
        part = re.findall(r"test_one\[\d+\]", done.stdout)
        assert 5 <= len(part) <= 25, done.stdout
        found += part
    assert sorted(found) == sorted(f"test_one[{i}]" for i in range(40))


PARSE = """
import argparse, contextlib, io, json, runpy, sys
for name in {absent!r}:
    sys.modules[name] = None  # as on the image: neither imported nor found
parse = argparse.ArgumentParser.parse_args
def stop(self, *args):
    parse(self, *args)
    raise SystemExit("parsed")
argparse.ArgumentParser.parse_args = stop
for command in json.loads(sys.argv[1]):
    sys.argv = command
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = "it parsed nothing"
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = repr(error)
    print(json.dumps([command, code]), flush=True)
"""


@pytest.mark.slow
def test_every_script_starts_on_a_bare_image(gpu_run, tmp_path):
    """Each script of bench/ without the peers' packages, and each command of a GPU's plans with its own parser."""
    plans = [part for train in (False, True) for part in gpu_run.plan(arguments(train=train), tmp_path, tmp_path)]
    commands = [s.command[1:] for stages in plans for stage in stages for s in stage if s.command[1].endswith(".py")]
    assert len(commands) == 10
    helped = [[str(path), "--help"] for path in sorted((ROOT / "bench").glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-c", PARSE.format(absent=ABSENT), json.dumps(commands + helped)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(commands) + len(helped), done.stderr
    answered = {None: "a module without a command line", 0: "--help", "parsed": "a command"}
    modules = {"common.py", "harness.py", "machine_code.py", "peers.py"}
    for (script, *options), code in lines:
        name = Path(script).name
        if name in modules:
            assert code == "it parsed nothing", (script, code)
        elif options == ["--help"]:
            assert code == 0 or re.fullmatch(r"(\w+) is not installed: pip install .*", str(code)), (script, code)
        else:
            assert answered.get(code) == "a command", (script, options, code, done.stderr[-2000:])


def test_a_check_that_is_cut_short_tells_what_it_found(monkeypatch, capsys):
    from fastpo import check

    def cases(device):
        yield check.Case(9, 8, 301), torch.float32
        raise KeyboardInterrupt  # what gpu.sh sends at the limit

    monkeypatch.setattr(check, "cases", cases)
    monkeypatch.setattr(check, "budgeted_error", lambda *args: (1.0, 0.5))
    with pytest.raises(KeyboardInterrupt):
        check.run_check("cpu", verbose=False)
    out = capsys.readouterr().out
    assert "9x8x301" in out and "FAILED" in out
    assert re.search(r"^0 of \d+ checks passed on cpu in .* s, the others have not run$", out, re.MULTILINE)


def wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                                          "Requires-Dist: not-in-the-folder\n")  # fmt: skip
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")


def test_wheels_for_this_run_only(tmp_path):
    folder, target = tmp_path / "wheels", tmp_path / "target"
    folder.mkdir()
    wheel(folder, "some_peer", "1.5")
    wheel(folder, "torch", "9.9")  # the machine's own is what is measured
    command = [sys.executable, str(ROOT / "bench" / "gpu_run.py"), "--install", str(folder), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"torch: left out, \d\S* is installed", done.stdout), done
    wheel(folder, "other_python", "1.0", "cp27-cp27m-win32")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "other_python-1.0-cp27-cp27m-win32.whl: NOT INSTALLED" in done.stdout, done
    assert "some_peer-1.5-py3-none-any.whl: installed" in done.stdout
    assert sorted(path.name for path in target.iterdir() if path.is_dir()) == ["some_peer", "some_peer-1.5.dist-info"]


@pytest.mark.slow
def test_dry_run(tmp_path):
    """The whole way on a CPU, in its short form: real sections, one archive."""
    only = ["env", "ours", "goals", "losses", "report"]
    command = ["bash", str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--only", *only]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    files = unpacked(tmp_path / "out")
    assert states(files) == dict.fromkeys(only, "ok")
    results = {"gpu.json", "ours/ops.json", "losses.json", "goals.json", "RESULTS.md"}
    assert set(files) == {f"run/{name}" for name in results} | {f"run/logs/{name}.log" for name in only}
    assert "fastpo_kept" in files["run/ours/ops.json"] and "| fastpo_dpo | dpo |" in files["run/RESULTS.md"]
    assert {goal["verdict"] for goal in json.loads(files["run/goals.json"])["goals"]} == {"not measured"}
    assert re.search(r"^env \| torch +\d", done.stdout, re.MULTILINE)
