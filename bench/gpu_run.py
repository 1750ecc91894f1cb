"""The sections of bench/gpu.sh: each within its time, its output streamed and kept, all that they leave in one archive.

    bash bench/gpu.sh --out FOLDER                     FOLDER/gpu.tar.gz: checks, tests, kernels, goals, peers
    bash bench/gpu.sh --out FOLDER --train             its other half: attention, training runs against TRL
    bash bench/gpu.sh --out FOLDER --wheels WHEELS     peers from wheels in a folder, for this run only
    bash bench/gpu.sh --device cpu --tiny --out FOLDER walks through its own logic on a CPU; its times mean nothing

Correctness first, side by side; then our figures, alone on the device, and their judge; then everybody's. A section
that fails or runs out of its time is named at the end, and the others still run. The archive is written anew after each
section, with the logs of failed ones, and once more at the end, also after SIGINT, SIGTERM and SIGHUP. Exit code: 0 all
sections ran and all goals that were measured are met, 1 not so, 2 a wrong option, 128 + n after signal n.

It needs no network, and nothing of the machine changes: wheels go into a temporary folder on the path of the sections
that have peers in them, caches and results into another. It is the standard library alone, so that the archive comes
about where nothing else works. An archive's halves go into place by

    tar xzf FOLDER/gpu.tar.gz -C bench/results/<machine> --strip-components 1
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = "gpu.tar.gz"
LIMIT_S = 540  # of everything
RESERVE_S = 50  # of it for the judge's last word, the report and the archive
CPU_SLACK = 4  # limits of the dry run: a CPU's interpreter and a busy machine are no GPU
GRACE_S = 6  # between SIGINT, at which pytest names what failed and a script shows where it was, and SIGKILL
LEAST_S = 5  # kept for the last archive in any case
# Files with tests that need a GPU; tests/test_gpu_run.py holds the list against the marks.
GPU_TESTS = (
    "tests/ops/test_entropy.py",
    "tests/ops/test_entropy_interpreter.py",
    "tests/ops/test_head.py",
    "tests/ops/test_kernels_interpreter.py",
    "tests/ops/test_vocab_ops.py",
    "tests/models/test_attention.py",
    "tests/models/test_tree_attention.py",
    "tests/models/test_tree_attention_interpreter.py",
    "tests/models/test_liger.py",
    "tests/models/test_policy.py",
    "tests/training/test_no_sync.py",
    "tests/training/test_optim.py",
    "tests/training/test_prompt_nll.py",
    "tests/training/test_triton_adamw_interpreter.py",
    "tests/test_trainer.py",
)
OURS = ("gemms_1", "gemms_2", "gemms_3", "fastpo_none", "fastpo_frozen", "fastpo_kept", "fastpo_sliced", "naive")
CACHES = ("FASTPO_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "HF_HOME", "XDG_CACHE_HOME",
          "MPLCONFIGDIR", "TMPDIR")  # fmt: skip


@dataclass
class Section:
    """A command with a time limit; its output goes to logs/<name>.log."""

    name: str
    limit: float  # seconds
    command: list[str]
    peers: bool = False  # the wheels are on its path
    environment: dict[str, str] = field(default_factory=dict)
    # What came of it:
    state: str = "not run"  # ok, exit code N, cut off, no time left, stopped
    seconds: float = 0.0
    last: str = ""  # where it did not succeed: the log's last line that speaks of a failure, else the last


class Running:
    """A section's process, its log, and how far the log has been printed."""

    def __init__(self, section: Section, log: Path, limit: float, environment: dict[str, str]):
        self.section, self.log, self.begin = section, log, time.monotonic()
        self.end, self.killed, self.printed, self.state = self.begin + limit, 0.0, 0, ""
        with log.open("wb") as file:
            try:
                self.process: subprocess.Popen | None = subprocess.Popen(
                    section.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    start_new_session=True,  # a group of its own: what it started ends with it
                )  # fmt: skip
            except OSError as error:
                self.process, self.state = None, "could not start"
                file.write(f"{error}\n".encode())

    def fresh_lines(self, all_of_it: bool = False) -> list[str]:
        """What the log has gained since; a line that is not whole yet only where `all_of_it`."""
        with self.log.open("rb") as file:
            file.seek(self.printed)
            data = file.read()
        if not all_of_it:
            data = data[: data.rfind(b"\n") + 1]
        self.printed += len(data)
        return data.decode(errors="replace").splitlines()

    def end_it(self, why: str) -> None:
        """SIGINT to the group, and SIGKILL where that was not enough."""
        now, self.state = time.monotonic(), self.state or why
        if not self.killed:
            self._signal(signal.SIGINT)
            self.killed = now
        elif now > self.killed + GRACE_S:
            self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def done(self) -> bool:
        """Whether the process has ended; what it left behind in its group ends too."""
        if self.process is not None and self.process.poll() is None:
            if not self.killed or time.monotonic() < self.killed + 3 * GRACE_S:
                return False
            self.state += ", and does not end"  # SIGKILL waits for a driver that hangs; the others do not
        if self.process is not None:
            self.kill()
            code = self.process.returncode
            self.state = self.state or ("ok" if code == 0 else f"exit code {code}")  # -N: signal N, not of ours
        self.section.state, self.section.seconds = self.state, round(time.monotonic() - self.begin, 1)
        return True


class Run:
    """The sections of one call, and their archive."""

    def __init__(self, out: Path, part: str, limit: float, about: dict[str, Any], reserve: float = RESERVE_S):
        self.begin, self.limit, self.reserve, self.about = time.monotonic(), limit, reserve, about
        self.out, self.part, self.stopped = out, part, 0
        self.sections: list[Section] = []
        out.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="fastpo-gpu-"))
        self.folder = self.work / "results" / part
        (self.folder / "logs").mkdir(parents=True)
        for name in CACHES:
            (self.work / "caches" / name).mkdir(parents=True)
        self.wheels = self.work / "wheels"
        self._keep_other_half()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stopped = self.stopped or number

    def _keep_other_half(self) -> None:
        """What an earlier run with or without --train left in this folder stays in the archive."""
        path = self.out / ARCHIVE
        if not path.exists():
            return
        try:
            with tarfile.open(path) as archive:
                others = [m for m in archive.getmembers() if not f"{m.name}/".startswith(f"{self.part}/")]
                archive.extractall(self.work / "results", others, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            say(f"{path} is no whole archive ({error}): now {aside.name}")

    def environment(self, section: Section) -> dict[str, str]:
        paths = [str(ROOT), *([str(self.wheels)] if section.peers else []), os.environ.get("PYTHONPATH", "")]
        fixed = {
            "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        caches = {name: str(self.work / "caches" / name) for name in CACHES}
        return os.environ | fixed | caches | section.environment

    def stage(self, sections: list[Section]) -> None:
        """Runs sections side by side, each until its limit, all of them until what is reserved is all that is left."""
        self.sections += sections
        left = self.begin + self.limit - self.reserve - LEAST_S - time.monotonic()  # the archive comes last
        running = []
        for section in sections:
            if self.stopped or left <= 0:
                section.state = "stopped" if self.stopped else "no time left"
                say(f"== {section.name}: {section.state}")
                continue
            say(f"== {section.name}: {' '.join(section.command)[:300]}")
            log = self.folder / "logs" / f"{section.name}.log"
            running.append(Running(section, log, min(section.limit, left), self.environment(section)))
        try:
            self._watch(running)
        finally:  # an error of ours leaves nothing behind on the device
            for item in running:
                item.kill()

    def _watch(self, running: list[Running]) -> None:
        while running:
            for item in list(running):
                done = item.done()
                if not done and (self.stopped or time.monotonic() > item.end):
                    item.end_it("stopped" if self.stopped else "cut off")
                for line in item.fresh_lines(all_of_it=done):
                    say(f"{item.section.name} | {line}")
                if done:
                    running.remove(item)
                    self._conclude(item)
            time.sleep(0.05)

    def _conclude(self, item: Running) -> None:
        section = item.section
        if section.state != "ok":
            lines = [x.strip() for x in item.log.read_text(errors="replace").splitlines() if x.strip()]
            told = [line for line in lines if re.search("error|FAILED|MISSED", line, re.IGNORECASE)]
            section.last = (told or lines or [""])[-1][:200]
        say(f"== {section.name}: {section.state} after {section.seconds:.0f} s")
        self.pack()

    def pack(self) -> None:
        """The archive, whole at every moment."""
        record = self.about | {
            "seconds": round(time.monotonic() - self.begin, 1),
            "signal": signal.Signals(self.stopped).name if self.stopped else None,
            "sections": [dataclasses.asdict(section) for section in self.sections],
        }
        name = "gpu.json" if self.part == "run" else f"gpu_{self.part}.json"
        (self.folder / name).write_text(json.dumps(record, indent=1) + "\n")
        fresh = self.out / f".{ARCHIVE}"
        with tarfile.open(fresh, "w:gz") as archive:
            for path in sorted((self.work / "results").rglob("*")):
                if path.is_file():
                    # A section may still be writing: what there is now goes in.
                    data = path.read_bytes()
                    member = tarfile.TarInfo(str(path.relative_to(self.work / "results")))
                    member.size, member.mtime = len(data), int(path.stat().st_mtime)
                    archive.addfile(member, io.BytesIO(data))
        fresh.replace(self.out / ARCHIVE)

    def finish(self) -> int:
        """The last archive, what did not succeed, the exit code."""
        self.pack()
        shutil.rmtree(self.work, ignore_errors=True)
        say(f"results in {self.out / ARCHIVE} after {time.monotonic() - self.begin:.0f} s")
        failed = [section for section in self.sections if section.state != "ok"]
        for section in failed:
            say(f"did not succeed: {section.name} ({section.state})" + (f": {section.last}" if section.last else ""))
        return 128 + self.stopped if self.stopped else int(bool(failed))


def say(text: str) -> None:
    """A line to whoever still listens: a closed terminal must not cost the archive."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def plan(args: argparse.Namespace, folder: Path, wheels: Path) -> tuple[list[list[Section]], list[list[Section]]]:
    """Stages, one after the other, of sections that run side by side; and those of the time that is reserved."""
    cuda = args.device == "cuda"

    def python(name: str, limit: float, *command: object, **more: Any) -> Section:
        return Section(name, limit if cuda else CPU_SLACK * limit, [sys.executable, *map(str, command)], **more)

    def bench(name: str, limit: float, script: str, *options: object, **more: Any) -> Section:
        return python(name, limit, ROOT / "bench" / script, *options, **more)

    def tests(name: str, limit: float, files: tuple[str, ...], most: int) -> list[Section]:
        """One process for every other core: a kernel's first launch compiles, on one core."""
        shards = max(1, min(most, (os.cpu_count() or 1) // 2)) if cuda else 1
        command = ["-m", "pytest", "-q", "-m", "gpu", "--maxfail", "10", "-rfEs", "-p", "no:cacheprovider", *files]
        return [
            python(f"{name}_{i}", limit, *command, peers=True, environment={"FASTPO_TEST_SHARD": f"{i}/{shards}"})
            for i in range(1, shards + 1)
        ]

    device = ("--device", args.device)
    first = []
    if args.wheels is not None:
        first = [[bench("wheels", 60, "gpu_run.py", "--install", args.wheels, wheels)]]
    card = [Section("card", 20, ["nvidia-smi"])] if cuda and shutil.which("nvidia-smi") else []
    if args.train:
        attention_tests = tuple(name for name in GPU_TESTS if "attention" in name)
        stages = [[python("train_env", 60, "-m", "fastpo", "env", peers=True), *card,
                   *tests("attention_tests", 100, attention_tests, 4)]]  # fmt: skip
        out = ("--out", folder)
        if cuda:
            stages += [[bench("attention", 80, "bench_attention.py", *device, *out)]]
            options = ["--steps", args.steps, "--repeats", "1", "--scenario", *args.scenario]
            stages += [[bench("train", 330, "train_vs_peers.py", *device, *options, *out, peers=True)]]
        else:
            stages += [[bench("attention", 60, "bench_attention.py", "--tokens", 256, "--rounds", 1, *out)]]
            options = ["--scenario", "synthetic", "--shape", "4x256", "--steps", 1, "--repeats", 1]
            options += ["--provider", "fastpo", "trl"]
            stages += [[bench("train", 200, "train_vs_peers.py", *options, *out, peers=True)]]
        return first + stages, []
    tiny = ["--tiny"] if args.tiny else []
    quick = ["--quick", "--shape", "64,32,1031", "--rounds", 2, "--no-compile"] if args.tiny else []
    sweep = ["--quick", "--no-compile"] if args.tiny else []
    interpreter = {} if cuda else {"TRITON_INTERPRET": "1"}
    judge = ("gpu_goals.py", "judge", *device, "--out", folder)
    correct = [
        python("env", 60, "-m", "fastpo", "env"),
        *card,
        python("check", 150, "-m", "fastpo", "check", *device, "--quiet"),
        *tests("tests", 150, GPU_TESTS, 6),
    ]
    # A peer that breaks the device's context, or takes too long to compile, must not cost our figures and their judge.
    alone = [
        bench("kernels", 60, "gpu_goals.py", "kernels", *device, "--out", folder, *tiny, environment=interpreter),
        bench("ours", 60, "bench_ops.py", *device, "--out", folder / "ours", "--seconds", 5, *quick,
              "--provider", *OURS),
        bench("goals", 30, *judge),
        bench("ops", 120, "bench_ops.py", *device, "--out", folder, "--seconds", 15, *quick, peers=True),
        bench("losses", 45, "bench_losses.py", *device, "--out", folder, "--seconds", 5, *quick, peers=True),
        bench("sweep", 45, "bench_ops.py", "--sweep", *device, "--out", folder, "--seconds", 1, "--rounds", 3, *sweep,
              peers=True),
    ]  # fmt: skip
    report = bench("report", 30, "report.py", "--folder", folder, "--output", folder / "RESULTS.md", peers=True)
    return [*first, correct, *([section] for section in alone)], [[bench("goals_peers", 30, *judge)], [report]]


def install(folder: Path, target: Path) -> int:
    """Wheels of `folder` into `target`; what the machine has already is what is measured, and stays."""
    from importlib import metadata

    wheels, rc = [], 0
    for path in sorted(folder.glob("*.whl")):
        name = re.sub(r"[-_.]+", "-", path.name.split("-")[0]).lower()
        try:
            print(f"{name}: left out, {metadata.version(name)} is installed")
        except metadata.PackageNotFoundError:
            wheels.append(path)
    if not wheels:
        print(f"no wheels to install in {folder}")
        return int(not folder.is_dir())
    pip, environment = [sys.executable, "-m", "pip"], dict(os.environ)
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        import ensurepip  # an environment without pip: Python's own copy, run from its wheel

        bundled = next((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
        environment["PYTHONPATH"] = os.pathsep.join([str(bundled), environment.get("PYTHONPATH", "")])
    command = [*pip, "install", "-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check",
               "--target", str(target)]  # fmt: skip
    if subprocess.run([*command, *wheels], env=environment).returncode != 0:
        for path in wheels:  # one that is for another Python must not cost the others
            done = subprocess.run([*command, "--upgrade", path], env=environment).returncode
            print(f"{path.name}: {'installed' if done == 0 else 'NOT INSTALLED'}")
            rc |= int(done != 0)
    print(f"{len(wheels)} wheels: {', '.join(path.name for path in wheels)}")
    return rc


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"),
                        help="folder of the archive; default $OUT, else runs/gpu")  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--train", action="store_true", help="attention and whole training runs instead")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="peers to install for this run only")
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        help=f"of everything; default {LIMIT_S}, on a CPU {CPU_SLACK * LIMIT_S}")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections only; --list names them")
    parser.add_argument("--list", action="store_true", help="the sections and their limits in seconds")
    parser.add_argument("--scenario", nargs="+", help="of --train, see bench/train_vs_peers.py",
                        default=["1b_full_1024_256", "1b_lora_64_512", "8b_lora_1024_256"])  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="of each training run")
    parser.add_argument("--install", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.install:
        return install(*args.install)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny: its times mean nothing")
    if args.wheels is not None:
        if not args.wheels.is_dir():
            parser.error(f"--wheels: {args.wheels} is no folder")
        args.wheels = args.wheels.resolve()
    args.out = args.out.resolve()
    slack = 1 if args.device == "cuda" else CPU_SLACK
    args.limit = slack * LIMIT_S if args.limit is None else args.limit
    names = [section for part in plan(args, Path(), Path()) for stage in part for section in stage]
    if args.list:
        for section in names:
            print(f"{section.name:18} {section.limit:g}")
        return 0

    def wanted(name: str) -> bool:
        return args.only is None or any(re.fullmatch(rf"{re.escape(only)}(_\d+)?", name) for only in args.only)

    if unknown := [only for only in args.only or [] if not any(re.fullmatch(rf"{re.escape(only)}(_\d+)?", s.name)
                                                               for s in names)]:  # fmt: skip
        parser.error(f"--only: no section {unknown[0]!r}; one of {', '.join(section.name for section in names)}")
    about = {"command": sys.argv[1:], "device": args.device, "tiny": args.tiny, "limit_s": args.limit,
             "python": sys.version.split()[0]}  # fmt: skip
    part = "train" if args.train else "run"
    run = Run(args.out, part, args.limit, about, 0 if args.train else slack * RESERVE_S)
    try:
        stages, closing = plan(args, run.folder, run.wheels)
        for stage in stages:
            run.stage([section for section in stage if wanted(section.name)])
        run.reserve = 0
        for stage in closing:
            run.stage([section for section in stage if wanted(section.name)])
    finally:
        code = run.finish()
    return code


if __name__ == "__main__":
    sys.exit(main())
