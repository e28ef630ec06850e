"""How good is a checker of answers? What it makes of labs/answers.txt, and of random expressions.

    python labs/checker.py                  # one_shot_rlvr.is_correct
    python labs/checker.py my_checker.py    # is_correct(response, answer) of a file of yours

A right answer that is refused is a reward lost; a wrong one that is paid is worse, for the model will learn
to give it; and a checker that raises ends the training, which is a mistake, too.
"""
import cmath
import itertools
import random
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl

# What takes long to match or to compute, as long as an answer may be (400 characters), a box (10,000), or
# neither; then deep brackets, a digit that is none, numbers too large for a root, and a list of 50
PIECES = r"""( { \sqrt - 3^{9999} (2/3)^{999} \frac{ \text{ \text{a} 4, ! | a_ _{1} \lfloor \sin ((((4))))^ 9^
    1,234 \pm2 \pm+- } \ \{ {} a \boxed \boxed{ \boxed{5}""".split()
HOSTILE = [(start + piece * (length // len(piece)) + end, "4") for piece in PIECES
           for length in (390, 9000, 10**5) for start in ("", "9") for end in ("9", "{")]
HOSTILE += [("((((((4))))))", "4"), ("\uff14", "4"), ("2^{2000}", r"\sqrt2"), (r"\log_{1e99999999} 7", "3.0"),
            (",".join(f"{i}.0" for i in range(60, 10, -1)), ",".join(map(str, range(10, 60))))]

def answer_pairs() -> list:
    """(kind, given, gold, whether it is right) of all that answers.txt and HOSTILE hold."""
    pairs, kind, gold = [], "", ""
    for line in Path(__file__).with_name("answers.txt").read_text(encoding="utf-8").splitlines():
        word, _, text = line.partition(" ")
        kind, gold = text if word == "#" else kind, text.lstrip() if word == "gold" else gold
        if word in ("right", "wrong"):
            pairs += [(kind, given, gold, word == "right") for given in text[1:].split(" | ")]
    return pairs + [("long, deep, huge", *pair, False) for pair in HOSTILE]

# {operator: its LaTeX, its value}; a tree is (operator, tree, ...), a number or a letter
GRAMMAR = {"+": ("{}+{}", lambda x, y: x + y), "*": (r"({})\cdot({})", lambda x, y: x * y),
           "-": ("{}-({})", lambda x, y: x - y), "/": (r"\frac{{{}}}{{{}}}", lambda x, y: x / y),
           "^": ("({})^{{2}}", lambda x: x**2), "root": (r"\sqrt{{{}}}", cmath.sqrt),
           "sin": (r"\sin({})", cmath.sin), "ln": (r"\ln({})", cmath.log), "cos": (r"\cos({})", cmath.cos),
           "floor": (r"\lfloor {} \rfloor", lambda x: cmath.exp(x * x) + 7)}  # any function that is no other

def random_tree(rng, depth):
    if depth == 0 or rng.random() < 0.15:
        return rng.choice([*range(1, 10), *"abxyABX"])
    name = rng.choice([*"++**--//^", "root", "sin", "ln", "cos", "floor"])
    return name, *(random_tree(rng, depth - 1) for _ in range(2 if name in "+*-/" else 1))

def latex_of(tree):
    return GRAMMAR[tree[0]][0].format(*map(latex_of, tree[1:])) if isinstance(tree, tuple) else str(tree)

def value_at(tree, point):
    """The oracle: no parser, just the tree; a letter is a number that the point makes of it."""
    if isinstance(tree, tuple):
        return GRAMMAR[tree[0]][1](*(value_at(part, point) for part in tree[1:]))
    return tree if isinstance(tree, int) else complex(random.Random(f"{tree} {point}").uniform(0.5, 3))

def rewritten(tree, rng):
    """Another spelling of the same value."""
    if not isinstance(tree, tuple):
        return rng.choice([tree, ("-", ("+", tree, 3), 3), ("*", 1, tree)])
    name, *parts = tree
    parts = [rewritten(part, rng) if rng.random() < 0.4 else part for part in parts]
    if name in "+*" and rng.random() < 0.7:
        parts = parts[::-1]
    return (name, *parts) if name != "-" or rng.random() < 0.5 else ("+", ("*", -1, parts[1]), parts[0])

def mutated(tree, rng):
    """One thing is another: a letter's case, a number, an operator, or two parts that change places."""
    if not isinstance(tree, tuple):
        return tree + 1 if isinstance(tree, int) else rng.choice([tree.swapcase(), "n", 2])
    name, *parts = tree
    if rng.random() < 0.6:
        place = rng.randrange(len(parts))
        return name, *parts[:place], mutated(parts[place], rng), *parts[place + 1:]
    if len(parts) == 2:
        return rng.choice([(name, *parts[::-1]), (rng.choice("+*-/"), *parts)])
    return rng.choice([(rng.choice(["^", "root", "sin", "ln", "floor"]), *parts), ("*", 2, tree), parts[0]])

def random_pairs(count):
    """Yield (given, gold, whether they are equal): a rewriting that is, or a mutation that is not."""
    rng = random.Random(0)
    while count:
        tree = random_tree(rng, rng.randint(1, 3))
        change = rng.choice([rewritten, mutated])
        other = change(tree, rng)
        try:
            values = [[value_at(t, point) for point in range(4)] for t in (tree, other)]
        except (ArithmeticError, ValueError):
            continue
        if max(abs(x) for x in sum(values, [])) > 1e6:
            continue
        equal = all(cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in zip(*values))
        if equal == (change is rewritten):  # a mutation may change nothing
            yield latex_of(other), latex_of(tree), equal
            count -= 1

def mistakes_of(is_correct, pairs) -> dict:
    """{"refused", "paid", "raised": what a checker gets wrong of pairs (kind, given, gold, right)}"""
    found = {"refused": [], "paid": [], "raised": []}
    for _, given, gold, right in pairs:
        mistake = f"{given[:60]}  for  {gold[:60]}"
        try:
            if bool(is_correct(rf"Thus the answer is $\boxed{{{given}}}$.", gold)) != right:
                found["refused" if right else "paid"].append(mistake)
        except (Exception, SystemExit) as error:
            found["raised"].append(f"{mistake} ({type(error).__name__})")
    return found

def print_table(is_correct, pairs) -> None:
    """A line for each kind of pairs, and below it the first mistakes."""
    print(f"{'':42}right  refused  wrong  paid  raised  microseconds")
    for kind, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        group, started = list(group), time.perf_counter()
        found = mistakes_of(is_correct, group)
        microseconds = 1e6 * (time.perf_counter() - started) / len(group)
        refused, paid, raised = map(len, found.values())
        right = sum(pair[3] for pair in group)
        print(f"{kind:42}{right:5}{refused:9}{len(group) - right:7}{paid:6}{raised:8}{microseconds:14,.0f}")
        for sort, mistakes in found.items():
            print("".join(f"    {sort}: {mistake}\n" for mistake in mistakes[:3]), end="")

def main(argv=None) -> None:
    parser = rl.make_parser(__doc__)
    parser.add_argument("checker", nargs="?", help="a Python file (default: one_shot_rlvr.py)")
    path = parser.parse_args(rl.words_of(argv)).checker
    try:
        is_correct = runpy.run_path(path)["is_correct"] if path else rl.is_correct
        if not callable(is_correct):
            raise TypeError("it is none")
    except (Exception, SystemExit) as error:  # a file can be wrong in any way
        rl.fail(f"{path}: no function is_correct(response, answer) can be had from it ({error})")
    expressions = [("2,000 random expressions", *pair) for pair in random_pairs(2000)]
    print_table(is_correct, answer_pairs() + expressions)

if __name__ == "__main__":
    rl.as_a_command(main)
