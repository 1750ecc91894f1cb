"""Shared by all tests: offline, one thread, seeded, a cache of their own; the `gpu` marker; fixtures."""

import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the scripts beside this file
from preloaded import Preloaded  # noqa: E402  # which minds forked processes' locks too

# Before torch and transformers are imported.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", PYTHONSAFEPATH="1")
# Test models are tiny: a second thread costs more than it brings, ten times as much where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none. FASTPO_TEST_SHARD=2/6 leaves the second of six parts, of about the
    same size, for processes side by side where there is no pytest-xdist (bench/gpu.sh)."""
    if shard := os.environ.get("FASTPO_TEST_SHARD"):
        part, parts = map(int, shard.split("/"))
        others = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts != part - 1]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part - 1]
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    reason = None
    if not torch.cuda.is_available():
        reason = "needs a GPU: torch.cuda.is_available() is False"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "needs compiled kernels: TRITON_INTERPRET=1"
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the user's cache of reference log-probabilities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTPO_CACHE", str(tmp_path_factory.mktemp("fastpo-cache")))
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout that holds these tests."""
    return ROOT


@pytest.fixture(scope="session")
def preloaded(_own_cache: None, tmp_path_factory: pytest.TempPathFactory):
    """`preloaded.run("-c", code, ...)`, `.start(...)`: Python processes that need no time to import (preloaded.py)."""
    server = Preloaded(tmp_path_factory.mktemp("preloaded"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory):
    """`once(name, make)`: the folder that `make(folder)` has filled, in whichever process of the session asked first.

    pytest-xdist makes a fixture again in every process, and again where a process returns to a module. Processes that
    ask for what another is making wait for it."""
    import fcntl

    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = home / name.replace("/", "-"), home / f"{name.replace('/', '-')}.made"
        home.mkdir(exist_ok=True)
        with open(made.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def shared_data():
    """`shared_data(name)`: path of a real data set in shared/data beside the checkout; skips where that is absent."""

    def find(name: str) -> Path:
        for folder in (ROOT.parent / "shared" / "data", ROOT / "shared" / "data"):
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"no shared/data/{name} beside the checkout")

    return find


@pytest.fixture
def round_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts fp32 off at bf16, with twice the error of the rounding that every GPU does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(array, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(array, from_dtype, to_dtype, mode)
        wide = torch.tensor(array.tolist() if array.ndim == 0 else array.copy(), dtype=torch.float32)
        return wide.bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture
def round_fma_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiply-add of fp32 rounds once, as on every GPU; Triton's interpreter before 3.9 rounds the product too."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        wide = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN, so that reading what was never written shows."""
    import torch

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def any_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a weight that overflows in fp32 are taken: the shortest way to a step that is not finite."""
    import math

    from fastpo.data import rows

    monkeypatch.setitem(rows.BOUNDS, "weight", (0.0, math.inf))


class Toy:
    """A tiny vocabulary of words, random Llama models over it, and seeded rows: what trainer tests are made of."""

    words = 97

    @staticmethod
    def tokenizer():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = ["<eos>", "<unk>", "<pad>", *(f"w{i}" for i in range(Toy.words))]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")

    @staticmethod
    def model(seed: int = 0, **changes):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        options = dict(
            vocab_size=Toy.words + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256,
        )  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))

    @staticmethod
    def reward_model(seed: int = 0, **changes):
        """The same trunk under a scalar head."""
        from transformers import LlamaForSequenceClassification

        config = Toy.model(seed, **changes).config
        config.num_labels, config.pad_token_id = 1, 2
        return LlamaForSequenceClassification(config)

    @staticmethod
    def text(rng: random.Random, low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(Toy.words)}" for _ in range(rng.randint(low, high)))

    @staticmethod
    def rows(n: int, seed: int = 0) -> list[dict]:
        rng = random.Random(seed)

        def row() -> dict:
            responses = {k: " " + Toy.text(rng, 2, 15) for k in ("chosen", "rejected")}
            return {"prompt": Toy.text(rng, 3, 20), **responses}

        return [row() for _ in range(n)]

    @staticmethod
    def kway_rows(n: int, seed: int = 0, sizes: tuple[int, ...] = (2, 3, 5)) -> list[dict]:
        """Rows of `sizes` responses in turn, with scores that tie now and then; every row has a pair."""
        rng = random.Random(seed)
        rows = []
        for i in range(n):
            responses = [{"text": " " + Toy.text(rng, 2, 12), "score": rng.randrange(10) / 2,
                          "win_prob": rng.randrange(100) / 100} for _ in range(sizes[i % len(sizes)])]  # fmt: skip
            responses[0]["score"] = 5.0
            rows.append({"prompt": Toy.text(rng, 3, 12), "responses": responses})
        return rows


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()


@pytest.fixture
def sgd_run(toy: Toy, tmp_path: Path):
    """`sgd_run(rows, **options)`: plain SGD on the toy model, all rows a step, nothing saved; `rest` are further
    arguments of `fastpo.train`."""
    import fastpo

    count = iter(range(100))

    def run(rows, rest=None, **options):
        defaults = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), disable_tqdm=True, use_cpu=True, bf16=False,
            logging_steps=1, per_device_train_batch_size=100, lr_scheduler_type="constant", optim="sgd",
            gradient_checkpointing=False, save_final=False, report=False, max_grad_norm=0.0, save_strategy="no",
        )  # fmt: skip
        args = {**defaults, **options}
        return fastpo.train(toy.model(), rows, processing_class=toy.tokenizer(), args=args, **rest or {})

    return run
