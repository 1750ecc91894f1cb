"""The package as users get it: wheel and editable, with and without the other package called `kernels`."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import warnings
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastpo
from fastpo.moved import MOVED

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REAL_KERNELS = "kernels==0.17.2"

# Run in a fresh process. argv: folder that fastpo must come from, what `import kernels` must be.
PROBE = """
import importlib.util
import sys
from pathlib import Path

where, kernels = Path(sys.argv[1]), sys.argv[2]

import fastpo
assert "torch" not in sys.modules and "transformers" not in sys.modules, "import fastpo is not light"
assert Path(fastpo.__file__).is_relative_to(where / "fastpo"), fastpo.__file__

spec = importlib.util.find_spec("kernels")
if kernels == "none":
    assert spec is None, spec
elif kernels == "namespace":  # the checkout's own folder, seen from its root: harmless to transformers
    assert spec.origin is None, spec
else:
    import kernels as other
    assert spec.origin is not None and "site-packages" in spec.origin, spec
    assert getattr(other, "STAND_IN", None) == (True if kernels == "stand-in" else None)

from transformers import LlamaConfig, LlamaForCausalLM
assert LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                    num_attention_heads=1)).lm_head is not None

import torch
import fastpo.kernels.reference as reference
assert Path(reference.__file__).is_relative_to(where), reference.__file__
torch.manual_seed(0)
hidden, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
target = torch.randint(0, 11, (5,))
expected = reference.linear_logprob(hidden, weight, target)
for backend in fastpo.available_backends():
    if backend == "triton":
        continue
    got = fastpo.linear_logprob(hidden.float(), weight.float().requires_grad_(), target, backend=backend)
    got.sum().backward()
    assert (got - expected).abs().max() < 1e-5, backend
print("backends", *fastpo.available_backends())
"""


def run(*command, check=True, **kwargs):
    """Runs a command in an environment without this process's Python settings; fails with its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | kwargs.pop("env", {})
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env=env, **kwargs)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def call_backend(hook, folder, out, env=None):
    """One PEP 517 hook of setuptools on a source folder, in this environment; returns the file it made."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    done = run(sys.executable, "-c", code, cwd=folder, env=env or {})
    return out / done.stdout.splitlines()[-1]


def copy_sources(folder):
    """What git would hold of the package: never builds in the checkout itself."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fastpo", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    return folder


@pytest.fixture(scope="module")
def checkout(once):
    return once("checkout", copy_sources)


@pytest.fixture(scope="module")
def unpacked(once, tmp_path_factory):
    """The sources that the source archive holds."""

    def build(folder):
        sdist = call_backend("build_sdist", copy_sources(tmp_path_factory.mktemp("sources")), folder)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / "unpacked", filter="data")

    (sources,) = (once("sdist", build) / "unpacked").iterdir()
    return sources


@pytest.fixture(scope="module")
def wheel(unpacked, once):
    (path,) = once("wheel", lambda folder: call_backend("build_wheel", unpacked, folder)).glob("*.whl")
    return path


@pytest.fixture(scope="module")
def editable_wheel(checkout, once):
    (path,) = once("editable", lambda folder: call_backend("build_editable", checkout, folder)).glob("*.whl")
    return path


class CleanEnvironment:
    """A virtual environment with nothing in it but what is installed, and this environment's dependencies."""

    def __init__(self, folder):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        self.dependencies = self.site / "dependencies.pth"

    def pip(self, *arguments, **kwargs):
        return run(sys.executable, "-m", "pip", "--python", self.python, *arguments, "--quiet", **kwargs)

    def install(self, wheel):
        # Before the dependencies are visible, so that pip never sees, let alone touches, the outer environment.
        assert not self.dependencies.exists()
        self.pip("install", "--no-deps", "--no-index", wheel)

    def show_dependencies(self):
        """The outer environment's packages; nested .pth files are not read, so its editable fastpo stays hidden."""
        self.dependencies.write_text(sysconfig.get_path("purelib") + "\n")

    def probe(self, where, kernels, cwd, env=None):
        return run(self.python, "-c", PROBE, where, kernels, cwd=cwd, env=env or {}).stdout


def add_kernels(environment, which):
    """The other package called `kernels`, installed by pip: a stand-in, or the real one where PyPI can be reached."""
    if which == "stand-in":
        source = environment.site.parent / "stand-in"
        (source / "kernels").mkdir(parents=True)
        (source / "kernels" / "__init__.py").write_text("STAND_IN = True\n")
        (source / "setup.py").write_text(
            "from setuptools import setup; setup(name='kernels', version='9.9', packages=['kernels'])"
        )
        environment.install(call_backend("build_wheel", source, source))
    elif which == "real":
        environment.show_dependencies()
        done = environment.pip("install", REAL_KERNELS, "-c", ROOT / "constraints.txt", check=False)
        environment.dependencies.unlink()
        if done.returncode != 0:
            pytest.skip(f"cannot install {REAL_KERNELS}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


# --- what is declared


def test_packages_are_the_folders():
    declared = PYPROJECT["tool"]["setuptools"]
    assert declared["package-dir"] == {"fastpo.kernels": "kernels"}
    found = set()
    for top, name in (("fastpo", "fastpo"), ("kernels", "fastpo.kernels")):
        for path in (ROOT / top).rglob("*.py"):
            below = path.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *below)))
    assert set(declared["packages"]) == found


def test_kernels_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_no_module_hides_another_when_its_folder_is_the_search_path():
    names = {path.stem for folder in ("fastpo", "kernels") for path in (ROOT / folder).glob("*.py")}
    taken = {"datasets", "kernels", "peft", "safetensors", "torch", "train", "transformers", "triton", "trl"}
    assert not names & (taken | (set(sys.stdlib_module_names) - {"__main__"}))


def test_constraints_satisfy_what_is_declared():
    project = PYPROJECT["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and "+" not in specifier.version, line
            pins[requirement.name.lower().replace("_", "-")] = specifier.version
    assert pins["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    pinned = ("test", "lint", "docs", "bench", "peft")
    for line in [*project["dependencies"], *(line for name in pinned for line in extras[name])]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), line


def test_addresses_are_of_one_repository():
    (home,) = re.findall(r"^repo_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(PYPROJECT["project"]["urls"]) == {"Documentation", "Source", "Issues", "Changelog"}
    assert all(url.startswith(home) for url in PYPROJECT["project"]["urls"].values())
    for url in PYPROJECT["project"]["urls"].values():
        path = url.removeprefix(f"{home}/blob/main/")
        assert path == url or (ROOT / path).is_file(), url


def test_ci_runs_what_the_readme_names():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    readme = (ROOT / "README.md").read_text()
    run_by_it = {word for line in script.splitlines() if line.startswith("make ") for word in line.split()}
    for target in ("quickstart", "test"):
        assert f"make {target}" in readme and target in run_by_it
    assert {"lint", "docs", "real"} <= run_by_it


def test_what_triton_interprets_is_run_in_its_interpreter():
    for script in ("Makefile", "tests/versions.sh"):
        text = (ROOT / script).read_text()
        assert '-k "_interpreter or triton-interpreted"' in text and "tests/*/test_*_interpreter.py" in text
        for path in (ROOT / "tests").glob("*/test_*.py"):
            name = path.relative_to(ROOT).as_posix()
            assert 'id="triton-interpreted"' not in path.read_text() or name in text, f"{script} does not name {name}"


# --- import


def test_import_is_light_and_exports_resolve(tmp_path):
    code = (
        "import sys, fastpo\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'yaml', 'triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "dir(fastpo)\n"
        "fastpo.TrainConfig, fastpo.config, fastpo.errors\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)
    for name in fastpo.__all__:
        assert getattr(fastpo, name) is not None
        assert name in dir(fastpo)
    assert fastpo.train.__module__ == "fastpo.trainer"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fastpo.trian  # noqa: B018


# --- the paths of before the rooms


# A name that each module had whose own name is another now.
RENAMED = {
    "data_docs": "table", "data_report": "DataReport", "games_cli": "make_game", "live_reference": "LiveReference",
    "loss_cpo": "cpo_hinge", "loss_docs": "page", "loss_functions": "dpo", "loss_statistics": "dno", "model": "Policy",
    "op_parts": "OpError", "prepare": "training_mode", "ref_policy": "cache_folder", "references": "Role",
    "row_conversions": "Unfit", "row_layouts": "Reading",
}  # fmt: skip


@pytest.mark.parametrize("old, new", MOVED.items())
def test_an_old_path_is_the_same_module_with_one_warning(old, new, monkeypatch):
    assert not (ROOT / "fastpo" / old).exists() and not (ROOT / "fastpo" / f"{old}.py").exists()
    monkeypatch.delitem(sys.modules, f"fastpo.{old}", raising=False)
    monkeypatch.delitem(vars(fastpo), old, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"import fastpo.{old}; import fastpo.{old}", {})
    said = [w for w in caught if f"fastpo.{old} is fastpo.{new} now" in str(w.message)]
    assert [w.category for w in said] == [FutureWarning]
    assert said[0].filename == "<string>"  # the line that imports it
    module = importlib.import_module(f"fastpo.{new}")
    assert sys.modules[f"fastpo.{old}"] is module and getattr(fastpo, old) is module
    assert module.__name__ == f"fastpo.{new}"
    assert hasattr(module, RENAMED[old]) if old in RENAMED else new.endswith(f".{old}")


def test_names_of_an_old_path(tmp_path):
    code = (
        "import sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "import fastpo\n"
        "assert not [name for name in sys.modules if name.startswith('fastpo.') and name != 'fastpo.moved']\n"
        "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    from fastpo.ref_policy import RefCache\n"
        "    from fastpo.ref_policy import cache_folder\n"
        "    import fastpo.callbacks\n"
        "    fastpo.callbacks, fastpo.guardrails\n"
        "from fastpo.reference import cache\n"
        "from fastpo.report import callbacks\n"
        "assert RefCache is cache.RefCache and cache_folder is cache.cache_folder\n"
        "assert fastpo.callbacks is callbacks\n"
        "said = [str(w.message).split()[0] for w in caught if 'the old path goes' in str(w.message)]\n"
        "assert said == ['fastpo.ref_policy', 'fastpo.callbacks', 'fastpo.guardrails'], said\n"
    )
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_a_path_that_never_was():
    with pytest.raises(ModuleNotFoundError, match="No module named 'fastpo.nonsense'"):
        importlib.import_module("fastpo.nonsense")
    with pytest.raises(ModuleNotFoundError):  # an old name of the top level is none of a room's
        importlib.import_module("fastpo.models.callbacks")


# --- what is built


def test_sdist_holds_the_sources(unpacked):
    for folder in ("fastpo", "kernels", "csrc"):
        wanted = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".inc", ".h")}
        assert wanted
        assert not {path for path in wanted if not (unpacked / path).is_file()}


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastpo"}  # nothing under `kernels`, nothing beside
    for folder, into in (("fastpo", "fastpo"), ("kernels", "fastpo/kernels")):
        wanted = {f"{into}/{p.name}" for p in (ROOT / folder).glob("*.py")}
        assert wanted <= names
    assert "fastpo/py.typed" in names
    assert not any(name.endswith((".cpp", ".inc", ".h", ".pth")) for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    if shutil.which(os.environ.get("CXX", "c++")):
        assert any(name.startswith("fastpo/_C") and name.endswith(".so") for name in names)
        assert "-cp311-abi3-" in wheel.name  # the stable ABI: one wheel for every Python


@pytest.mark.parametrize(
    "kind, kernels",
    [
        pytest.param("wheel", "none", id="wheel"),
        pytest.param("wheel", "stand-in", id="wheel-beside-stand-in"),
        pytest.param("wheel", "real", id="wheel-beside-real-kernels"),
        pytest.param("editable", "none", id="editable"),
        pytest.param("editable", "stand-in", id="editable-beside-stand-in"),
    ],
)
def test_installed(kind, kernels, request, tmp_path):
    environment = CleanEnvironment(tmp_path / "venv")
    add_kernels(environment, kernels)
    before = sorted(environment.site.glob("kernels*/**/*.py"))
    if kind == "wheel":
        where = environment.site
        environment.install(request.getfixturevalue("wheel"))
    else:
        where = request.getfixturevalue("checkout")
        environment.install(request.getfixturevalue("editable_wheel"))
    environment.show_dependencies()
    outside = tmp_path / "outside"
    outside.mkdir()
    environment.probe(where, kernels, cwd=outside)
    if kind == "editable":
        # From the root, which joins sys.path: a folder without __init__.py never wins over a package.
        environment.probe(where, "namespace" if kernels == "none" else kernels, cwd=where)
    if kind == "wheel" and kernels == "stand-in":
        script = environment.python.with_name("fastpo")
        assert run(script, "--version", cwd=outside).stdout == f"fastpo {fastpo.__version__}\n"
        assert str(where) in run(script, "env", cwd=outside).stdout
        assert run(environment.python, "-m", "fastpo", "nonsense", cwd=outside, check=False).returncode == 2

    environment.dependencies.unlink()
    environment.pip("uninstall", "--yes", "fastpo")
    assert not (environment.site / "fastpo").exists()
    assert sorted(environment.site.glob("kernels*/**/*.py")) == before
    if kernels == "stand-in":
        run(environment.python, "-c", "import kernels; assert kernels.STAND_IN", cwd=outside)


def test_build_without_a_compiler(tmp_path):
    false = {"CC": "/bin/false", "CXX": "/bin/false", "LDSHARED": "/bin/false"}
    source = tmp_path / "source"
    source.mkdir()
    wheel = call_backend("build_wheel", copy_sources(source), tmp_path, env=false)
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
    environment = CleanEnvironment(tmp_path / "venv")
    environment.install(wheel)
    environment.show_dependencies()
    assert "torch" in environment.probe(environment.site, "none", cwd=tmp_path).split()


# --- this checkout, as the tests run it


def test_module_from_the_root():
    assert f"checkout {ROOT}" in run(sys.executable, "-m", "fastpo", "env", cwd=ROOT).stdout
