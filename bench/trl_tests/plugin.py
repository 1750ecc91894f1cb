"""A pytest plugin for TRL's own test files: stand-ins for the hub, and one side's trainers.

The environment says what is run: TRL_TESTS_SIDE is `trl` or `fastpo`, TRL_TESTS_STAND_INS the folder of the stand-ins,
TRL_TESTS_OUT the JSON file for the outcomes by test name. TRL's files are imported as they are; under `fastpo` the
trainers that they import from `trl` are classes over `fastpo.Trainer`.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import datasets
import stand_ins
import trl
from trl import import_utils

SIDE = os.environ["TRL_TESTS_SIDE"]
_HUB, _SETS = stand_ins.build(Path(os.environ["TRL_TESTS_STAND_INS"]))
_load_dataset = datasets.load_dataset


def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset`, with TRL's names for the stand-ins' folders."""
    return _load_dataset(str(_SETS.get(path, path)), *args, **kwargs)


datasets.load_dataset = load_dataset


def _probe(name: str) -> Any:
    """`trl.import_utils.is_PACKAGE_available` of another version of TRL than the one that is installed."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: importlib.util.find_spec(name[3:-10]) is not None
    raise AttributeError(name)


vars(import_utils)["__getattr__"] = _probe


def _shims() -> None:
    """TRL's names of its trainers, for classes over fastpo's."""
    from trl.experimental import cpo, orpo

    import fastpo

    class Shim(fastpo.Trainer):
        config_class: Any = None

        def __init__(self, model: Any = None, args: Any = None, **arguments: Any):
            # What docs/migrating-from-trl.md says: TRL loads a name in float32.
            if isinstance(model, str) and "dtype" not in (getattr(args, "model_init_kwargs", None) or {}):
                arguments["dtype"] = "float32"
            if args is None:
                args = self.config_class(output_dir=os.environ["TRL_TESTS_OUT"] + "-run", report_to="none")
                arguments["overwrite_output_dir"] = True
            super().__init__(model, arguments.pop("train_dataset", None), args=args, **arguments)

        aux_loss_enabled = property(lambda self: any("aux_loss" in line for line in self.state.log_history))

    for module, name in ((trl, "DPO"), (trl, "KTO"), (cpo, "CPO"), (orpo, "ORPO")):
        tags = (*fastpo.Trainer._tag_names, "trl", name.lower())
        shim = type(f"{name}Trainer", (Shim,), {"config_class": getattr(module, f"{name}Config"), "_tag_names": tags})
        setattr(module, f"{name}Trainer", shim)


if SIDE == "fastpo":
    _shims()


class Outcomes:
    """The last phase that did not pass, by test; with the error's last line."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        before = self.by_name.get(report.nodeid, ["passed", ""])
        if report.outcome != "passed" and before[0] == "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else str(report.longrepr)
            self.by_name[report.nodeid] = [report.outcome, " ".join(text.split())[:400]]
        elif report.when == "call":
            self.by_name.setdefault(report.nodeid, before)
        Path(os.environ["TRL_TESTS_OUT"]).write_text(json.dumps(self.by_name, indent=1))


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Outcomes(), "trl_tests_outcomes")
