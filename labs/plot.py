"""Draw runs: reward and test accuracy on one axis, what the policy does meanwhile, the benchmarks before and after.

    python labs/plot.py runs/tiny-add-tiny-base --output runs/plot.png
    python labs/plot.py runs/pg-* runs/full-* --seeds --output runs/plot.svg     # pg-0, pg-1, ...: mean and range

Test accuracy is what --eval-every of one_shot_rlvr.py wrote into metrics.jsonl, or evaluate.py --run into curve.jsonl.
Needs matplotlib, an optional extra: pip install matplotlib.
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # noqa: E402

# Okabe and Ito's colours, which the colour-blind tell apart, each with a dash pattern of its own for those who print
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)), (0, (3, 4))]
PANELS = {"entropy": "entropy (nats a token)", "kl": "KL to the base model",
          "response_length": "response length (tokens)", "truncated_frac": "share of responses cut short",
          "dead_groups": "share of dead groups"}


def read_run(run) -> tuple:
    """A run's rows of training steps, and {step: {benchmark: accuracy, ..., "average"}} from wherever it is."""
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
    values = np.array([[one[step] for step in steps] for one in series])                                # (seeds, steps)
    return steps, values.mean(0), values.min(0), values.max(0)


def draw(groups, output) -> None:
    """groups: {label: [runs that differ in the seed]} -> a picture, PNG or SVG by its name."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        rl.fail("labs/plot.py needs matplotlib, an optional extra: pip install matplotlib")
    plt.rcParams.update({"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.3, "lines.linewidth": 2.5, "svg.fonttype": "none"})
    figure = plt.figure(figsize=(20, 13), layout="constrained")
    grid = figure.add_gridspec(3, 4)
    main, bars = figure.add_subplot(grid[:2, :2]), figure.add_subplot(grid[2, :3])
    small = [figure.add_subplot(grid[place]) for place in [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]]
    runs = {label: [read_run(run) for run in paths] for label, paths in groups.items()}

    def line(axis, series, style, **options):
        steps, mean, low, high = over_seeds(series)
        axis.plot(steps, mean, **style, **options)
        if len(series) > 1:
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)

    for number, (label, seeds) in enumerate(runs.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        line(main, [{row["step"]: row["reward"] for row in rows} for rows, _ in seeds], style, alpha=0.45)
        if all(tests for _, tests in seeds):
            line(main, [{step: test["average"] for step, test in tests.items()} for _, tests in seeds], style,
                 marker="o", markersize=9, label=f"{label}: test accuracy")
        else:
            main.plot([], [], **style, label=f"{label}: training reward")
        for axis, key in zip(small, PANELS):
            line(axis, [{row["step"]: row[key] for row in rows} for rows, _ in seeds], style)
    main.set(title="training reward (pale) and test accuracy (dots)", xlabel="step", ylim=(0, 1.02))
    main.legend(loc="lower right", fontsize=15)
    for axis, title in zip(small, PANELS.values()):
        axis.set(title=title, xlabel="step")
        axis.set_ylim(0, 1.02 if "share" in title else None)

    tested = {label: [tests for _, tests in seeds if tests] for label, seeds in runs.items()}
    tested = {label: seeds for label, seeds in tested.items() if seeds}
    names = [name for seeds in list(tested.values())[:1] for name in seeds[0][min(seeds[0])]]
    names = [name for name in names if name != "average"] + ["average"] * bool(names)
    after = {label: [np.mean([tests[max(tests)].get(name, np.nan) for tests in seeds]) for name in names]
             for label, seeds in tested.items()}
    before = [np.nanmean([tests[min(tests)].get(name, np.nan) for seeds in tested.values() for tests in seeds])
              for name in names]
    width = 0.8 / (len(after) + 1)
    for number, (label, heights) in enumerate({"before training": before, **after}.items()):
        colour = "#BBBBBB" if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
        bars.bar(np.arange(len(names)) + (number - len(after) / 2) * width, heights, width, color=colour,
                 edgecolor="white", hatch="" if number < 2 else "//.x\\o*-|"[(number - 2) % 9], label=label)
    bars.set(title="test accuracy by benchmark" if names else "no test accuracy: train with --eval",
             xticks=range(len(names)), ylim=(0, 1.02))
    bars.set_xticklabels(names)
    if names:
        bars.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4, fontsize=13, frameon=False)
    figure.savefig(output, dpi=80)
    plt.close(figure)
    print(f"written to {output}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = rl.fail
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--seeds", action="store_true", help="runs NAME-0, NAME-1, ... are one line, mean and range")
    parser.add_argument("--output", type=Path, default=Path("runs/plot.png"),
                        help=".png or .svg (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".svg"):
        rl.fail(f"--output {args.output}: its name must end in .png or .svg")
    groups = {}
    for run in args.runs:
        name = Path(run).name
        groups.setdefault(re.sub(r"-[0-9]+$", "", name) if args.seeds else name, []).append(run)
    rl.make_folder(args.output.parent, "--output")
    draw(groups, args.output)


if __name__ == "__main__":
    main()
