"""bench/RESULTS.md and its plots from the JSON under bench/results/<machine>/.

python bench/report.py [--folder bench/results/<machine> ...] [--output bench/RESULTS.md]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import bench_ops  # noqa: E402
import harness  # noqa: E402

RESULTS = harness.common.ROOT / "bench" / "results"
AXES = ("N", "D", "V")
# Ours in one colour, told apart by line; the bound in grey; peers in colours that survive colour blindness (Okabe-Ito).
STYLES = {
    "gemms_3": ("three bare GEMMs", "0.45", ":"),
    "fastpo_kept": ("fastpo, kept", "#D55E00", "-"),
    "fastpo_sliced": ("fastpo, recomputed", "#D55E00", "--"),
    "fastpo_frozen": ("fastpo, frozen head", "#D55E00", "-."),
    "naive": ("plain PyTorch", "black", "-"),
    "torch_lce_sum": ("F.linear_cross_entropy, chunked", "#0072B2", "-"),
    "torch_lce_sum_256": ("F.linear_cross_entropy, 256 rows a chunk", "#0072B2", "--"),
    "trl_chunked": ("TRL, chunked", "#009E73", "-"),
    "liger_dpo_eager": ("Liger DPO", "#CC79A7", "-"),
    "liger_ce": ("Liger cross entropy", "#CC79A7", "--"),
    "quack": ("QuACK", "#56B4E9", "-"),
    "cce_exact": ("cut-cross-entropy, exact", "#E69F00", "-"),
}


def plots(results: list[dict], folder: Path) -> list[Path]:
    """sweep_time.png and sweep_memory.png: three panels, against N, D and V through the first shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base, paths = results[0]["shape"], []
    for key, unit, scale, title in (
        ("p50_s", "milliseconds", 1e3, "sweep_time"),
        ("peak_bytes", "peak MiB", 1 / 2**20, "sweep_memory"),
    ):
        figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
        for axis, panel in enumerate(panels):
            for name, (label, color, line) in STYLES.items():
                points = sorted(
                    (r["shape"][axis], r["rows"][name][key] * scale)
                    for r in results
                    if all(r["shape"][i] == base[i] for i in range(3) if i != axis)
                    and r["rows"].get(name, {}).get(key) is not None
                )
                if points:
                    panel.plot(*zip(*points), color=color, linestyle=line, marker="o", markersize=3, label=label)
            panel.set(xscale="log", yscale="log", xlabel=AXES[axis])
            ticks = sorted({r["shape"][axis] for r in results})
            panel.set_xticks(ticks, [f"{x:,}" for x in ticks])
            panel.minorticks_off()
            panel.set_title(", ".join(f"{a} {base[i]:,}" for i, a in enumerate(AXES) if i != axis), fontsize=9)
            panel.grid(True, alpha=0.3)
        panels[0].set_ylabel(unit)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
        path = folder / f"{title}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths


def environment_line(path: Path) -> str:
    info = json.loads(path.read_text())["machine_info"]
    versions = [f"{k} {info[k]}" for k in ("torch", "triton", "trl", "liger_kernel", "cut-cross-entropy",
                                            "quack-kernels") if info.get(k)]  # fmt: skip
    commit = (info.get("commit") or "unknown")[:10] + (" with changes" if info.get("dirty") else "")
    cores = "" if info.get("cuda") else f"{info['cores']} cores ({info.get('cpu_capability')}), "
    return f"{cores}Python {info['python']}, {', '.join(versions)}; commit {commit}."


def section(folder: Path, relative_to: Path) -> list[str]:
    """The Markdown of one machine."""
    lines = [f"## {folder.name}", ""]
    titles = {"ops": "The head op", "losses": "Loss level", "sweep": "Against N, D and V"}
    for group, title in titles.items():
        path = folder / f"{group}.json"
        if not path.exists():
            lines += [f"### {title}", "", "Not measured.", ""]
            continue
        results = harness.read(path)
        lines += [f"### {title}", "", environment_line(path), ""]
        if group == "sweep" and importlib.util.find_spec("matplotlib") is None:
            lines += ["Not drawn: matplotlib is not installed.", ""]
            continue
        if group == "sweep":
            for picture in plots(results, folder):
                lines += [f"![{picture.stem.replace('_', ' ')}]({os.path.relpath(picture, relative_to)})", ""]
            continue
        for result in results:
            lines += [harness.table(result)]
            if group == "ops" and tuple(result["shape"]) in bench_ops.SHAPES[result["device"]]:
                said = bench_ops.verdict(result)
                lines += [f"* {harness.VERDICTS[good]}: {sentence}" for good, sentence in said] + [""]
        if group == "ops":
            seen = {tuple(result["shape"]) for result in results}
            promised = bench_ops.SHAPES[results[0]["device"]]
            lines += [f"N {n}, D {d}, V {v}: not measured.\n" for n, d, v in promised if (n, d, v) not in seen]
    goals = folder / "goals.json"
    if goals.exists():
        lines += ["### Goals", "", "| goal | measured | limit | |", "| --- | --- | --- | --- |"]
        for goal in json.loads(goals.read_text())["goals"]:
            value = goal["reason"] if goal["value"] is None else f"{goal['value']:.3g} {goal['unit']}".strip()
            limit = "" if goal["limit"] is None else f"{goal['sense']} {goal['limit']:g} {goal['unit']}".strip()
            lines.append(f"| {goal['name']} | {value} | {limit} | {goal['verdict']} |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, nargs="+", help="machines; default all with an ops.json")
    parser.add_argument("--output", type=Path, default=harness.common.ROOT / "bench" / "RESULTS.md")
    args = parser.parse_args()
    folders = args.folder or sorted(path.parent for path in RESULTS.glob("*/ops.json"))
    if not folders:
        raise SystemExit(f"no ops.json in the folders of {RESULTS}; run bench/bench_ops.py first")
    lines = [
        "# Benchmarks",
        "",
        "Written by `bench/report.py` from the JSON beside the plots; `make bench` makes all of it. What the columns",
        "mean and how it is measured: [docs/benchmarks.md](../docs/benchmarks.md).",
        "",
    ]
    for folder in folders:
        lines += section(folder, args.output.resolve().parent)
    if all(folder.name.startswith("cpu") for folder in folders):
        lines += [
            "## GPUs",
            "",
            "Not measured: no GPU has run the suite. `bash bench/gpu.sh --out FOLDER` does all of it.",
            "",
        ]
    args.output.write_text("\n".join(lines))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
