"""Which example to train on? The paper's historical variance score, from the run of a full set.

    python labs/tiny.py --set 48 --output runs/set-48.jsonl                   # or a set of your own
    python one_shot_rlvr.py --preset tiny --example runs/set-48.jsonl --output-dir runs/set-48
    python labs/select_example.py runs/set-48 --top 1 --output runs/best.jsonl
    python one_shot_rlvr.py --preset tiny --example runs/best.jsonl --output-dir runs/best

An example is visited once an epoch, and each visit has an accuracy, the mean of its group of rollouts. Its score is the
standard deviation of these accuracies (population; the paper says variance, which ranks alike): high for an example
that goes from wrong to right during the run, zero for one that is always right or always wrong. Sorted by score, ties
in the order of the set; the paper's pi_1 is the first of 1,209 (Sec. 2, released code data_selection.py). The paper
also finds that many examples of low score train nearly as well: try --bottom.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # noqa: E402


def history(rows) -> dict:
    """Rows of metrics.jsonl -> {name: [accuracy of each visit]}; two groups of an example in one step are one visit."""
    accuracies = {}
    for row in rows:
        for name, accuracy in row.get("examples", {}).items():
            accuracies.setdefault(name, []).append(accuracy)
    return accuracies


def rank(accuracies, names) -> list:
    """[(name, score, mean accuracy, visits), ...], the highest score first, ties in the order of `names`."""
    scored = [(name, float(np.std(accuracies[name])), float(np.mean(accuracies[name])), len(accuracies[name]))
              for name in names if name in accuracies]
    return sorted(scored, key=lambda row: -row[1])                 # sorted is stable


def main(argv=None) -> None:
    parser = rl.make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run on a set of examples")
    parser.add_argument("--top", type=int, default=0, help="write the N highest-scoring examples")
    parser.add_argument("--bottom", type=int, default=0, help="write the N lowest-scoring examples")
    parser.add_argument("--output", type=Path, help="a .jsonl file that --example of one_shot_rlvr.py takes")
    parser.add_argument("--show", type=int, default=10, help="rows of the ranking to print from each end (default: 10)")
    args = parser.parse_args(argv)
    if bool(args.output) != bool(args.top or args.bottom):
        rl.fail("--output needs --top N or --bottom N, and these need --output")
    if min(args.top, args.bottom, args.show) < 0:
        rl.fail(f"--top {args.top} --bottom {args.bottom} --show {args.show}: use 0 or more")
    if args.output and args.output.exists():
        rl.fail(f"--output {args.output}: is already there; name another")
    names = rl.read_json(args.run / "config.json", "example")["example"]
    examples = {example["name"]: example for example in rl.load_examples(names)}
    ranking = rank(history(rl.read_log(args.run / "metrics.jsonl")), examples)
    if not ranking:
        rl.fail(f"{args.run}: no step has been made yet")
    visits = [row[3] for row in ranking]
    print(f"{len(ranking)} of {len(examples)} examples were visited, {min(visits)} to {max(visits)} times each\n\n"
          f"rank  score   mean  visits  name        problem")
    for place, (name, score, mean, n) in enumerate(ranking, 1):
        if place <= args.show or place > len(ranking) - args.show:
            print(f"{place:>4}  {score:.3f}  {mean:.3f}  {n:>6}  {name[:10]:<10}  {examples[name]['problem'][:60]}")
        elif place == args.show + 1:
            print(" ...")
    if max(visits) < 2:
        print("\nno example was visited twice, so all scores are 0; train for more --steps")
    if args.output:
        rl.make_folder(args.output.parent, "--output")
        chosen = [row for place, row in enumerate(ranking)
                  if place < args.top or place >= len(ranking) - args.bottom]
        rl.append_rows(args.output, [{key: examples[name][key] for key in ("name", "problem", "answer")}
                                     for name, *_ in chosen])
        print(f"\n{len(chosen)} written to {args.output}")


if __name__ == "__main__":
    rl.as_a_command(main)
