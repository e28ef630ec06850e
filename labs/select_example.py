"""Which example to train on? By the base model's accuracy, or by the paper's historical variance score.

    python labs/select_example.py --probe Qwen/Qwen2.5-Math-1.5B         # before training; best on a GPU
    python labs/select_example.py --probe runs/tiny-base --k 64 --example tiny-add tiny-sub mine.jsonl
    python labs/select_example.py runs/set-48 --top 1 --output runs/best.jsonl      # after a run on a set

An example teaches if the model solves it sometimes. --probe samples k responses to each as training does,
and ranks by nearness to 30% right: at 2%, 85% of the groups of 8 are dead, and at 90% there is little left to
learn. Eight responses tell an accuracy to within 16 points or so; take more for the few that are near.

A run on a set (labs/tiny.py --set 48 --output runs/set-48.jsonl makes one, which one_shot_rlvr.py takes as
--example) visits an example once an epoch, and each visit has an accuracy, the mean of its group. Its score
is the standard deviation of these (population; the paper says variance, which ranks alike): high for an
example that goes from wrong to right, zero for one that is always right or always wrong. Ties are in the
order of the set; the paper's pi_1 is the first of 1,209 (Sec. 2, released code data_selection.py). The paper
also finds that many examples of low score train nearly as well: try --bottom.
"""
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # before torch, as in evaluate.py

import numpy as np
import torch

MOST_TO_LEARN = 0.3  # accuracy of the base model


# -- 1. Before training: accuracy of the base model --------------------------------------

def probe(model, tokenizer, examples, k, max_response_tokens, slots=None, seed=0) -> list:
    """k responses to each example, all sampled in one call -> rows, the nearest to 30% right first."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    kept = []
    for example in examples:
        prompt = rl.encode_prompt(tokenizer, example["problem"] + rl.TRAIN_SUFFIX)
        if len(prompt) + max_response_tokens <= context:
            kept += k * [(example, prompt)]
    if left_out := len(examples) - len(kept) // k:
        print(f"{left_out} of {len(examples)} examples are left out: with --max-response-tokens "
              f"{max_response_tokens} they do not fit into the model's {context} tokens")
    if not kept:
        rl.fail(f"--max-response-tokens {max_response_tokens}: no example is left; use fewer")
    repeated, prompts = zip(*kept)
    rl.check_prompts(model, prompts, len(prompts) * [max_response_tokens])
    stop_ids = rl.find_stop_ids(tokenizer, model.generation_config)
    responses = rl.generate(model, prompts, max_response_tokens=max_response_tokens, slots=slots,
                            temperature=rl.Config.temperature, stop_ids=stop_ids,
                            generator=torch.Generator().manual_seed(seed),
                            cuda_graph=model.device.type == "cuda")
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    verdicts = [(rl.is_correct(text, example["answer"]), rl.has_box(text), response[-1] not in stop_ids)
                for example, text, response in zip(repeated, texts, responses)]
    means = np.reshape(verdicts, (-1, k, 3)).mean(1).tolist()
    rows = [{**example, "accuracy": accuracy, "boxed": boxed, "truncated": truncated}
            for example, (accuracy, boxed, truncated) in zip(repeated[::k], means)]
    return sorted(rows, key=lambda row: abs(row["accuracy"] - MOST_TO_LEARN))

def rank_by_probe(args) -> tuple:
    """Examples in the order of the ranking, the head of its table, and a line for each."""
    known = rl.read_json(Path(rl.__file__).resolve().with_name("examples.json"))
    examples = rl.load_examples(args.example or known)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = rl.load_model(args.probe, dtype)
    default = rl.Config(**rl.PRESETS["tiny" if args.probe == rl.TINY_BASE else "paper"])
    longest, started = args.max_response_tokens or default.max_response_tokens, time.time()
    rows = probe(model, tokenizer, examples, args.k, longest, args.slots, args.seed)
    print(f"{args.k} responses to each of {len(rows)} examples in {time.time() - started:.0f} s")
    lines = [f"{row['accuracy']:>5.0%}  {row['boxed']:>5.0%}  {row['truncated']:>9.0%}" for row in rows]
    return rows, "right  boxed  truncated", lines


# -- 2. After a run on a set: historical variance score ----------------------------------

def history(rows) -> dict:
    """Rows of metrics.jsonl -> {name: [accuracy of each visit]}; groups of one step are one visit."""
    accuracies = {}
    for row in rows:
        for name, accuracy in row.get("examples", {}).items():
            accuracies.setdefault(name, []).append(accuracy)
    return accuracies

def rank(accuracies, names) -> list:
    """[(name, score, mean accuracy, visits), ...], the highest score first, ties in the order of `names`."""
    scored = [(name, float(np.std(accuracies[name])), float(np.mean(accuracies[name])), len(accuracies[name]))
              for name in names if name in accuracies]
    return sorted(scored, key=lambda row: -row[1])  # sorted is stable

def rank_by_run(args) -> tuple:
    """Examples in the order of the ranking, the head of its table, and a line for each."""
    names = rl.read_json(args.run / "config.json", "example")["example"]
    examples = {example["name"]: example for example in rl.load_examples(names)}
    ranking = rank(history(rl.read_log(args.run / "metrics.jsonl")), examples)
    if not ranking:
        rl.fail(f"{args.run}: no step has been made yet")
    visits = [row[3] for row in ranking]
    print(f"{len(ranking)} of {len(examples)} examples were visited, {min(visits)} to {max(visits)} times "
          "each")
    if max(visits) < 2:
        print("no example was visited twice, so all scores are 0; train for more --steps")
    return ([examples[name] for name, *_ in ranking], "score   mean  visits",
            [f"{score:.3f}  {mean:.3f}  {n:>6}" for _, score, mean, n in ranking])


# -- The command -------------------------------------------------------------------------

def print_ranking(examples, head, lines, show) -> None:
    print(f"\nrank  {head}  name        problem")
    for place, (example, line) in enumerate(zip(examples, lines), 1):
        if place <= show or place > len(examples) - show:
            problem = " ".join(example["problem"].split())[:60]
            print(f"{place:>4}  {line}  {example['name'][:10]:<10}  {problem}")
        elif place == show + 1:
            print(" ...")

def parse_args(argv=None):
    parser = rl.make_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run on a set of examples")
    parser.add_argument("--top", type=int, default=0, help="write the first N examples of the ranking")
    parser.add_argument("--bottom", type=int, default=0, help="write the last N examples of the ranking")
    parser.add_argument("--output", type=Path, help="a .jsonl file that --example of one_shot_rlvr.py takes")
    parser.add_argument("--show", type=int, help="lines to print from each end (default: 10, of a probe all)")
    group = parser.add_argument_group("probe")
    group.add_argument("--probe", metavar="MODEL", help="Hugging Face id or folder of a base model")
    group.add_argument("--example", nargs="+", help="names or files (default: all names in examples.json)")
    group.add_argument("--k", type=int, default=8, help="responses to each (default: %(default)s)")
    group.add_argument("--max-response-tokens", type=int,
                       help=f"longest response (default: 3072, and 64 for {rl.TINY_BASE})")
    group.add_argument("--slots", type=int, default=rl.Config.slots,
                       help="responses sampled at the same time (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    args = parser.parse_args(rl.words_of(argv))
    rl.check_numbers(vars(args), {"top": 0, "bottom": 0, "show": 0, "seed": 0})
    if bool(args.run) == bool(args.probe):
        rl.fail("give either the folder of a run, or --probe and a model")
    if bool(args.output) != bool(args.top or args.bottom):
        rl.fail("--output needs --top N or --bottom N, and these need --output")
    if args.output and args.output.exists():
        rl.fail(f"--output {args.output}: is already there; name another")
    return args

def main(argv=None) -> None:
    args = parse_args(argv)
    examples, head, lines = rank_by_probe(args) if args.probe else rank_by_run(args)
    show = args.show if args.show is not None else len(lines) if args.probe else 10
    print_ranking(examples, head, lines, show)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        chosen = [example for place, example in enumerate(examples)
                  if place < args.top or place >= len(examples) - args.bottom]
        rl.append_rows(args.output, [{key: example[key] for key in ("name", "problem", "answer")}
                                     for example in chosen])
        print(f"\n{len(chosen)} written to {args.output}")

if __name__ == "__main__":
    rl.as_a_command(main)
