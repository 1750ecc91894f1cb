"""Where modules went that lay flat in fastpo/ before 0.1.0: for one release, their old paths still lead there.

None of them was documented, but scripts have them. An import by an old path warns once, names the new one, and gives
the same module.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adapters": "models.adapters",
    "arrow": "data.arrow",
    "attention": "models.attention",
    "backends": "ops.backends",
    "bounds": "config.bounds",
    "callbacks": "report.callbacks",
    "charts": "report.charts",
    "checkpoint": "checkpoints.checkpoint",
    "chips": "ops.chips",
    "compiled": "models.compiled",
    "content": "data.content",
    "data_docs": "data.docs",
    "data_report": "data.report",
    "disks": "report.disks",
    "distributed": "training.distributed",
    "encoding": "data.encoding",
    "endings": "checkpoints.endings",
    "evaluation": "training.evaluation",
    "function_state": "reference.function_state",
    "games_cli": "games.curves",
    "grad_filter": "ops.grad_filter",
    "guardrails": "training.guardrails",
    "hub": "report.hub",
    "inputs": "training.inputs",
    "kway": "data.kway",
    "layout": "models.layout",
    "live_reference": "reference.live",
    "loading": "models.loading",
    "loss_cpo": "losses.cpo",
    "loss_docs": "losses.docs",
    "loss_functions": "losses.functions",
    "loss_statistics": "losses.statistics",
    "memory": "training.memory",
    "metrics": "training.metrics",
    "migration": "config.migration",
    "mixing": "data.mixing",
    "model": "models.policy",
    "model_files": "checkpoints.model_files",
    "no_effect": "config.no_effect",
    "noise": "models.noise",
    "objective": "training.objective",
    "op_parts": "ops.parts",
    "optim": "training.optim",
    "options": "config.options",
    "outputs": "report.outputs",
    "packer": "data.packer",
    "packing": "data.packing",
    "prefetch": "data.prefetch",
    "prepare": "models.modes",
    "ref_policy": "reference.cache",
    "references": "reference.sources",
    "rotary": "models.rotary",
    "router_loss": "training.router_loss",
    "row_conversions": "data.conversions",
    "row_layouts": "data.layouts",
    "row_statistics": "training.row_statistics",
    "rows": "data.rows",
    "run_data": "training.run_data",
    "run_lock": "checkpoints.run_lock",
    "samples": "training.samples",
    "saving": "checkpoints.saving",
    "signals": "training.signals",
    "sources": "data.sources",
    "start_checks": "training.start_checks",
    "state_files": "checkpoints.state_files",
    "step_plan": "training.step_plan",
    "stepwide": "training.stepwide",
    "tabular": "games.tabular",
    "tree_attention": "models.tree_attention",
    "trl_configs": "config.trl_configs",
    "turns": "data.turns",
    "verify": "models.verify",
    "vocab_ops": "ops.vocab_ops",
    "vocab_parallel": "ops.vocab_parallel",
    "weightless": "plan.weightless",
    "win_probs": "data.win_probs",
}


class _Alias(Loader):
    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"fastpo.{MOVED[old.removeprefix('fastpo.')]}"
        warnings.warn(f"{old} is {new} now, and the old path goes with the next release", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, _Alias()) if package == "fastpo" and name in MOVED else None


def install() -> None:
    """Let imports find the old paths; where there is no module of that name, so that the finder comes last."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
