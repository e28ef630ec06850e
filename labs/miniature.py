"""The paper's tables in miniature: each row is one_shot_rlvr.py with a few flags, on the tiny world.

    python labs/miniature.py                                # all, three seeds: half an hour on two cores
    python labs/miniature.py --rows loss --seeds 1          # one part, one seed
    python labs/miniature.py --rows one pg entropy          # some rows
    python labs/miniature.py --list                         # the rows and their flags; nothing is run

Every run is a process of its own, with its folder runs/miniature/ROW-SEED and its log there; a run that is
done is not made again (so name another --output-dir after a change of the code), one that was cut short goes
on where it was. Each part's table is printed and written to runs/miniature/PART.md: training accuracy in the
last tenth of the steps and test accuracy after the last, over the six benchmarks, as mean and standard error
over seeds. With matplotlib, its curves are drawn to PART.png.
"""
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import one_shot_rlvr as rl
from evaluate import standard_error
from labs import plot, tiny

SETS = {"set-16.jsonl": 16, "set-1024.jsonl": 1024}
# part: (the question, what the paper has for it, {row: (what it is, the paper's figure, flags)})
# A row may stand in several parts: it is run once, with the flags of the first.
PARTS = {
    "examples": ("Does one example match a whole set?", "Table 8, average of six benchmarks", {
        "one": ("one example", "35.0", ""),
        "two": ("two examples", "36.6", "--example tiny-add tiny-mul"),
        "four": ("four examples", "36.0", "--example tiny-add tiny-sub tiny-mul tiny-max"),
        "sixteen": ("sixteen examples", "", "--example {out}/set-16.jsonl"),
        "set": ("a set of 1,024 (paper: 1,209)", "35.9", "--example {out}/set-1024.jsonl"),
    }),
    "tasks": ("Does it matter which example?",
              "Table 3, MATH500: 45 (too hard), 54 (wrong label), else 64 to 74", {
        "one": ("addition", "", ""),
        "sub": ("subtraction", "", "--example tiny-sub"),
        "mul": ("multiplication", "", "--example tiny-mul"),
        "max": ("largest of three", "", "--example tiny-max"),
        "mod": ("remainder", "", "--example tiny-mod"),
        "eqn": ("equation", "", "--example tiny-eqn"),
    }),
    "loss": ("Which term of the loss does it?", "Table 5, rows 2 to 10, MATH500", {
        "pg": ("policy gradient alone", "71.8", "--weight-decay 0 --kl-coef 0 --entropy-coef 0"),
        "pg-wd": ("+ weight decay", "71.4", "--kl-coef 0 --entropy-coef 0"),
        "pg-wd-kl": ("+ KL", "70.8", "--entropy-coef 0"),
        "one": ("+ entropy: all terms", "74.8", ""),
        "entropy-3": ("three times the entropy", "73.6", "--entropy-coef 0.003"),
        "pg-entropy": ("policy gradient and entropy", "75.6", "--weight-decay 0 --kl-coef 0"),
        "wd-kl": ("weight decay and KL", "39.0", "--pg-coef 0 --entropy-coef 0"),
        "wd-kl-entropy": ("weight decay, KL, entropy", "65.4", "--pg-coef 0"),
        "entropy": ("entropy alone", "63.4", "--pg-coef 0 --weight-decay 0 --kl-coef 0"),
    }),
    "labels": ("Must the label be right?", "Table 5, rows 5 and 11 to 13, and Table 14, MATH500", {
        "one": ("right: 85 (paper: 12.7)", "73.4", ""),
        "near": ("slightly wrong: 84 (12.8)", "74.8", "--answer 84"),
        "guess": ("wrong, but sometimes guessed: 80 (4)", "57.0", "--answer 80"),
        "never": ("never obtained: 929725", "64.4", "--answer 929725"),
        "format": ("no label: any boxed answer", "65.4", "--reward format"),
    }),
    "method": ("Does the algorithm matter?", "Table 4, average: GRPO 35.0, PPO 33.8", {
        "one": ("GRPO, 1 update, groups of 8", "35.0", ""),
        "eight": ("8 updates a batch", "", "--updates-per-batch 8"),
        "one-group": ("one group of 128", "", "--prompts-per-step 1 --group-size 128"),
        "ppo": ("PPO", "33.8", "labs/ppo.py"),
    }),
    "post": ("What happens after training accuracy has saturated?", "Fig. 2: test accuracy goes on rising", {
        "long": ("five times as many steps", "", "--steps 300"),
    }),
}
EVAL = ["--eval", *tiny.BENCHMARKS, "--eval-every", "30"]
CHILDREN = []  # the processes that were started

def command(row, seed, out) -> list:
    """Of a row: one_shot_rlvr.py, or the lab that it names, with the flags as they stand in PARTS."""
    flags = next(rows[row][2] for _, _, rows in PARTS.values() if row in rows)
    flags = [word.format(out=out) for word in flags.split()]
    script = flags.pop(0) if flags and flags[0].endswith(".py") else "one_shot_rlvr.py"
    return [script, "--preset", "tiny", *EVAL, "--save-every", "1000", *flags, "--seed", str(seed),
            "--output-dir", f"{out}/{row}-{seed}"]

def last_test(run):
    """{benchmark: accuracy} after the last step of a run, or None if it has not come to its end."""
    if not rl.read_log(run / "metrics.jsonl"):
        return None
    return plot.read_run(run)[1].get(rl.read_json(run / "config.json")["steps"])

def make_run(row, seed, out) -> str:
    """One run in a process of its own, on one thread: it then does not depend on what runs beside it.

    Returns what went wrong, if anything did.
    """
    run, words = Path(f"{out}/{row}-{seed}"), command(row, seed, out)
    if (run / "config.json").exists():
        words.append("--resume")
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.txt", "a", encoding="utf-8") as log:
        child = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=log, stderr=log,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        CHILDREN.append(child)
        code = child.wait()
    failure = f"{shlex.join(['python', *words])} ended with exit code {code}; see {run / 'log.txt'}"
    return failure if code else ""

def make_runs(missing, out, jobs) -> None:
    """All runs that are missing, [(row, seed), ...], some at a time; the first that fails ends all."""
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), desc="runs", disable=None) as progress:
        waiting = [pool.submit(make_run, row, seed, out) for row, seed in missing]
        try:
            for job in as_completed(waiting):
                if failure := job.result():
                    rl.fail(failure)
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in waiting):
                for child in CHILDREN:  # or they would go on alone, and a second call would meet them
                    child.terminate()
                time.sleep(0.1)
            raise

def cell(values, scale=100, digits=1) -> str:
    """Mean and standard error over seeds."""
    error = standard_error(values)
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * np.mean(values):.{digits}f}{spread}"

def table_line(title, figure, training, tests) -> str:
    """tests: {benchmark: accuracy} of each seed."""
    by_benchmark = [f"{100 * np.mean([test[name] for test in tests]):.0f}" for name in tiny.BENCHMARKS]
    cells = title, figure, training, cell([test["average"] for test in tests]), *by_benchmark
    return f"| {' | '.join(cells)} |"

def table_of_rows(rows, seeds, out) -> list:
    """A line for the base model and each row {row: (what, paper's figure, flags)}, with all benchmarks."""
    lines = [f"| row | paper | training | test | {' | '.join(tiny.BENCHMARKS).replace('tiny_', '')} |",
             "|---" * (4 + len(tiny.BENCHMARKS)) + "|"]
    for row, (what, figure, _) in rows.items():
        training, tests = zip(*(plot.read_run(out / f"{row}-{seed}") for seed in seeds))
        if len(lines) == 2:
            lines.append(table_line("the base model", "", "", [test[0] for test in tests]))
        tail = [np.mean([step["accuracy"] for step in steps[-len(steps) // 10:]]) for steps in training]
        lines.append(table_line(f"`{row}`: {what}", figure, cell(tail), [test[max(test)] for test in tests]))
    return lines

def table_of_steps(row, seeds, out) -> list:
    """A line for each evaluation of one row, with what the policy was like in the ten steps before it."""
    lines = ["| step | training | test | entropy | KL | tokens |", "|---" * 6 + "|"]
    training, tests = zip(*(plot.read_run(out / f"{row}-{seed}") for seed in seeds))
    for step in sorted(set(tests[0]) - {0}):
        before = [[row for row in rows if step - 10 < row["step"] <= step] for rows in training]
        accuracy, entropy, kl, tokens = ([np.mean([row[key] for row in rows]) for rows in before]
                                         for key in ("accuracy", "entropy", "kl", "response_length"))
        tested = cell([test[step]["average"] for test in tests])
        lines.append(f"| {step} | {cell(accuracy)} | {tested} | {cell(entropy, 1, 3)} | {cell(kl, 1, 3)} | "
                     f"{cell(tokens, 1)} |")
    return lines

def chosen_parts(names) -> dict:
    """PARTS, or those of the names that are parts, and one of all rows that are named by themselves."""
    every = {row: of_row for _, _, of_part in PARTS.values() for row, of_row in of_part.items()}
    if unknown := [name for name in names if name not in every and name not in PARTS]:
        rl.fail(f"--rows {unknown[0]}: there are the rows {', '.join(every)} and the parts "
                f"{', '.join(PARTS)}")
    parts = {part: of_part for part, of_part in PARTS.items() if part in names or not names}
    if rows := {row: every[row] for row in names if row in every}:
        parts["rows"] = ("The rows that were named", "see the parts that they belong to", rows)
    return parts

def main(argv=None) -> None:
    parser = rl.make_parser(__doc__)
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME",
                        help=f"rows of --list, or parts: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3,
                        help="runs of each row, with seeds 0, 1, ... (default: 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="runs at the same time (default: one a core)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/miniature"),
                        help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the command of each row; run nothing")
    args = parser.parse_args(rl.words_of(argv))
    rl.check_numbers(vars(args), {})
    parts = chosen_parts(args.rows)
    rows = list(dict.fromkeys(row for _, _, of_part in parts.values() for row in of_part))
    seeds, out = range(args.seeds), args.output_dir
    if args.list:
        commands = {row: shlex.join(["python", *command(row, 0, out)]) for row in rows}
        return print("\n".join(f"{row:<14} {words}" for row, words in commands.items()))
    out.mkdir(parents=True, exist_ok=True)
    for name, size in SETS.items():
        rl.append_rows(out / name, tiny.train_problems(size), mode="w")
    rl.make_tiny_base(rl.TINY_BASE)  # here, before many processes want it at the same time
    missing = [(row, seed) for seed in seeds for row in rows if last_test(out / f"{row}-{seed}") is None]
    print(f"{len(rows)} rows x {args.seeds} seeds: {len(rows) * args.seeds - len(missing)} runs are done, "
          f"{len(missing)} to go, {args.jobs} at a time; the log of each is in {out}/ROW-SEED/log.txt")
    make_runs(missing, out, args.jobs)
    for part, (question, source, of_part) in parts.items():
        lines = table_of_steps(*of_part, seeds, out) if part == "post" else table_of_rows(of_part, seeds, out)
        text = f"**{question}** ({part}; paper: {source})\n\n" + "\n".join(lines) + "\n"
        print(f"\n{text}")
        (out / f"{part}.md").write_text(text, encoding="utf-8")
        if importlib.util.find_spec("matplotlib"):
            picture = {row: [out / f"{row}-{seed}" for seed in seeds] for row in of_part}
            plot.draw(picture, out / f"{part}.png")
    print(f"written to {out}: {', '.join(f'{part}.md' for part in parts)}")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rl.as_a_command(main)
