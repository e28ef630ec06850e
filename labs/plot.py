"""Draw runs: reward and test accuracy, what the policy does meanwhile, the benchmarks before and after.

    python labs/plot.py runs/tiny-add-tiny-base --output runs/plot.png
    python labs/plot.py runs/pg-* runs/one-* --seeds --output runs/plot.svg    # pg-0, pg-1: mean and range

Test accuracy is what --eval-every of one_shot_rlvr.py wrote into metrics.jsonl, or evaluate.py --run into
curve.jsonl. Needs matplotlib, an optional extra: pip install matplotlib.
"""
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl

# Okabe and Ito's colours, which the colour-blind tell apart, each with dashes of its own for those who print
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F", "#7A3B00",
           "#C8B400"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)), (0, (3, 4)), (0, (9, 1)),
          (0, (2, 1))]
# what is logged: (title, upper end of the axis)
PANELS = {"entropy": ("entropy (nats a token)", None), "kl": ("KL to the initial model (nats)", None),
          "response_length": ("response length (tokens)", None),
          "truncated_frac": ("share of responses cut short", 1.02),
          "dead_groups": ("share of dead groups", 1.02)}
LOOKS = {"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3, "lines.linewidth": 2.5, "svg.fonttype": "none"}

def read_run(run) -> tuple:
    """A run's rows of training steps, and {step: {benchmark: accuracy, ..., "average"}} of its tests."""
    run = Path(run)
    rows = rl.read_log(run / "metrics.jsonl")
    if not rows:
        rl.fail(f"{run}: no metrics.jsonl of a run in it")
    tests = {row["step"]: row["eval"] for row in rows if "eval" in row}
    for row in [] if tests else rl.read_log(run / "curve.jsonl"):
        tests[row["step"]] = {key: value for key, value in row.items() if key not in ("step", "reward")}
    return [row for row in rows if "reward" in row], tests

def over_seeds(series) -> tuple:
    """[{step: value} of each seed] -> steps that all have, mean, lowest, highest."""
    steps = sorted(set.intersection(*map(set, series)))
    values = np.array([[one[step] for step in steps] for one in series])  # (seeds, steps)
    return steps, values.mean(0), values.min(0), values.max(0)

def draw_line(axis, series, style, **options) -> None:
    steps, mean, low, high = over_seeds(series)
    axis.plot(steps, mean, **style, **options)
    if len(series) > 1:
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)

def draw_curves(curves, panels, runs) -> None:
    """Reward and test accuracy on the axis `curves`, the rest on `panels`; runs: {label: [each seed's]}."""
    for number, (label, seeds) in enumerate(runs.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        rewards = [{row["step"]: row["reward"] for row in rows} for rows, _ in seeds]
        draw_line(curves, rewards, style, alpha=0.45)
        if all(tests for _, tests in seeds):
            averages = [{step: test["average"] for step, test in tests.items()} for _, tests in seeds]
            draw_line(curves, averages, style, marker="o", markersize=9, label=label)
        else:
            curves.plot([], [], **style, label=f"{label} (not tested)")
        for axis, key in zip(panels, PANELS):
            # --kl-coef 0 measures no KL
            if key != "kl" or any(row["kl"] for rows, _ in seeds for row in rows):
                draw_line(axis, [{row["step"]: row[key] for row in rows} for rows, _ in seeds], style)
    curves.set(title="training reward (pale), mean test accuracy (dots)", xlabel="step", ylim=(0, 1.02))
    curves.legend(loc="best", fontsize=13, ncols=1 + len(runs) // 6, framealpha=0.6)
    for axis, (title, top) in zip(panels, PANELS.values()):
        axis.set(title=title, xlabel="step")
        axis.set_ylim(0, top)

def draw_bars(axis, runs) -> None:
    """Accuracy on each benchmark before training, the mean of all runs, and after it."""
    tested = {label: [tests for _, tests in seeds if tests] for label, seeds in runs.items()}
    tested = {label: seeds for label, seeds in tested.items() if seeds}
    if not tested:
        axis.set_axis_off()
        return axis.set(title="no test accuracy yet: python evaluate.py --run RUN")
    first = next(iter(tested.values()))[0]
    names = [name for name in first[min(first)] if name != "average"] + ["average"]
    everything = [tests[min(tests)] for seeds in tested.values() for tests in seeds]
    heights = {"before training": [np.nanmean([test.get(name, np.nan) for test in everything])
                                   for name in names]}
    for label, seeds in tested.items():
        if any(max(tests) == min(tests) for tests in seeds):
            continue  # tested before the training alone
        heights[label] = [np.mean([tests[max(tests)].get(name, np.nan) for tests in seeds]) for name in names]
    width = 0.8 / len(heights)
    for number, (label, values) in enumerate(heights.items()):
        places = np.arange(len(names)) + (number - (len(heights) - 1) / 2) * width
        axis.bar(places, values, width, label=label, edgecolor="white",
                 color=COLOURS[(number - 1) % len(COLOURS)] if number else "#BBBBBB",
                 hatch="/.x\\o*-|"[(number - 2) % 8] if number > 1 else "")
    axis.set(title="test accuracy by benchmark", xticks=range(len(names)), ylim=(0, 1.02))
    axis.set_xticklabels(names)
    axis.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4, fontsize=13, frameon=False)

def draw(groups, output) -> None:
    """groups: {label: [runs that differ in the seed]} -> a picture, PNG or SVG by its name."""
    runs = {label: [read_run(run) for run in paths] for label, paths in groups.items()}
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        rl.fail("labs/plot.py needs matplotlib, an optional extra: pip install matplotlib")
    with plt.rc_context(LOOKS):
        figure = plt.figure(figsize=(20, 13), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06)  # room for the longest labels of a panel within
        grid = figure.add_gridspec(3, 4)
        panels = [figure.add_subplot(grid[place]) for place in [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]
        draw_curves(figure.add_subplot(grid[:2, :2]), panels, runs)
        draw_bars(figure.add_subplot(grid[2, :3]), runs)
        figure.savefig(output, dpi=80)
        plt.close(figure)
    print(f"written to {output}")

def main(argv=None) -> None:
    parser = rl.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--seeds", action="store_true",
                        help="runs NAME-0, NAME-1, ... are one line, mean and range")
    parser.add_argument("--output", type=Path, default=Path("runs/plot.png"),
                        help=".png or .svg (default: %(default)s)")
    args = parser.parse_args(rl.words_of(argv))
    if args.output.suffix not in (".png", ".svg"):
        rl.fail(f"--output {args.output}: its name must end in .png or .svg")
    groups = {}
    for run in args.runs:
        name = Path(run).name
        groups.setdefault(re.sub(r"-[0-9]+$", "", name) if args.seeds else name, []).append(run)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(groups, args.output)

if __name__ == "__main__":
    rl.as_a_command(main)
