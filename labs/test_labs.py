"""Tests of the labs: no network, no GPU, no weights but those made here.

    pytest labs/test_labs.py
"""
import ast
import copy
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import one_shot_rlvr as rl  # before torch, as in the scripts

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from labs import benchmark, checker, miniature, plot, ppo, select_example, tiny
from test_one_shot import (PROMPTS, RESPONSES, batch_of, comparable, easy_reward, folder, model, random_model,
                           read_jsonl, refused, run_flags, same_weights)

SCRIPTS = [path for path in sorted((ROOT / "labs").glob("*.py")) if path.name != "test_labs.py"]
MINE = '{"problem": "What is 2 + 2?", "answer": "4"}\n'


# -- All of them -------------------------------------------------------------------------

def first_name(node):
    """rl of rl.f, of rl.Config.steps and of rl.PRESETS["tiny"]."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return getattr(node, "id", None)

def rebound(source) -> list:
    """Lines of a script that assign to, or delete, an attribute or a key of what it imports."""
    tree, imported, lines = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    for node in ast.walk(tree):
        target = None
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node
        if isinstance(node, ast.Call) and first_name(node.func) in ("setattr", "delattr"):
            target = node.args[0]
        lines += [node.lineno] if first_name(target) in imported else []
    return lines

def test_labs_change_nothing_of_another_module():
    """A lab that rebinds a function of the trainer would say one thing and do another."""
    patches = ["rl.f = 1", "rl.Config.steps += 1", 'a, rl.x["y"] = 1, 2', "for rl.x in (): pass", "del rl.f",
               'setattr(rl, "f", 1)', "rl.f: int = 1"]
    for line in patches:
        assert rebound(f"import one_shot_rlvr as rl\n{line}\n") == [2], line
    assert rebound("import one_shot_rlvr as rl\nx = rl.f(rl.g)\nx.y = rl.h\n") == []
    assert {path.name: rebound(path.read_text(encoding="utf-8")) for path in SCRIPTS} \
        == {path.name: [] for path in SCRIPTS}

@pytest.mark.parametrize("module", [benchmark, checker, miniature, plot, ppo, select_example, tiny])
def test_help_and_bad_flags(module, capsys, refused):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and module.__doc__.splitlines()[0] in capsys.readouterr().out
    assert "--no-such-flag" in refused(module.main, ["x", "--no-such-flag"])

# each script alone, as python labs/SCRIPT.py would have it; in one process, because torch takes its time
EACH = """import runpy, sys
from pathlib import Path
clean = sys.path[1:]
for script in sys.argv[1:]:
    sys.path[:] = [str(Path(script).parent), *clean]
    for name in ("one_shot_rlvr", "evaluate", "labs", "labs.tiny", "labs.plot"):
        sys.modules.pop(name, None)
    sys.argv[:] = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0
"""

def test_every_script_starts_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, "-c", EACH, *map(str, SCRIPTS)], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0 and done.stdout.count("usage:") == len(SCRIPTS) == 7, done.stderr


# -- The tiny world ----------------------------------------------------------------------

def decimal(name, digits):
    """A task that a model learns by heart in seconds: the decimals of a number."""
    def task(rng):
        n = rng.randint(1, len(digits))
        steps = f"decimal {n} of {name} is {digits[n - 1]}."
        return f"What is decimal {n} of {name}?", steps, int(digits[n - 1])
    return task

def test_reward_rises_in_a_smaller_world(tmp_path):
    """The whole way: pretrain a base model that knows pi and seldom says so, train on one decimal."""
    tiny.build_base(tmp_path / "base", steps=100, batch_size=20, tasks={"pi": decimal("pi", "1415")})
    (tmp_path / "one.jsonl").write_text('{"problem": "What is decimal 4 of pi?", "answer": 5}')
    rl.main(["--preset", "tiny", "--model", str(tmp_path / "base"), "--example", str(tmp_path / "one.jsonl"),
             "--steps", "10", "--prompts-per-step", "6", "--max-response-tokens", "24",
             "--learning-rate", "3e-4", "--output-dir", str(tmp_path / "run")])
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[:2]) < 0.4 and np.mean(rewards[-3:]) > 0.75
    assert rows[-1]["boxed_frac"] > rows[0]["boxed_frac"]

def test_tiny_problems_and_their_steps_are_right():
    rng = random.Random(0)
    for name, task in tiny.TASKS.items():
        for _ in range(200):
            problem, steps, answer = task(rng)
            a, b, *c = map(int, re.findall(r"[0-9]+", problem))
            right = {"tiny_add": a + b, "tiny_sub": a - b, "tiny_mul": a * b, "tiny_max": max(a, b, *c),
                     "tiny_mod": a % b, "tiny_eqn": b - a}
            assert answer == right[name]
            for left, result in re.findall(r"([0-9][0-9+*-]*)=([0-9]+)", steps):
                assert eval(left) == int(result)

def test_tiny_tests_are_held_out():
    rng, tests = random.Random(0), tiny.held_out()
    for name in tiny.BENCHMARKS:
        assert len({row["problem"] for row in tiny.load_benchmark(name)}) == tiny.TEST_SIZE
        assert tiny.load_benchmark(name) == tiny.load_benchmark(name)
    documents = [tiny.document(rng, tests) for _ in range(20_000)]
    asked = {problem for text in documents for problem in re.findall("user\\n(.*?[?.])(?: Let's|<)", text)}
    examples = json.loads((ROOT / "examples.json").read_text())
    train = tiny.train_problems(1024)
    assert len(asked) > 1000 and len(train) == 1024
    for others in (asked, {row["problem"] for row in train}, {row["problem"] for row in examples.values()}):
        assert not tests & others

def test_tiny_tokenizer_survives_saving_under_the_models_name(tmp_path):
    """AutoTokenizer rebuilds a Qwen2 folder's by Qwen2's rules: another kind would lose its spaces."""
    tokenizer = tiny.make_tokenizer()
    text = "What is 47 + 38? Let's think; \\boxed{85}, \\frac{1}{2} \n  and \u00e9."
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text

def test_tiny_sets_and_what_is_refused(tmp_path, refused):
    output = tmp_path / "sets" / "set.jsonl"
    tiny.main(["--set", "12", "--output", str(output), "--seed", "1"])
    problems = [example["problem"] for example in rl.load_examples([str(output)])]
    assert problems == [row["problem"] for row in tiny.train_problems(12, seed=1)]
    for flags, words in [(["--set", "12", "--output", str(output)], "is already there"),
                         (["--set", "3001", "--output", "x.jsonl"], "--set 3001: use at most 3000"),
                         (["--set", "12", "--output", "x.json"], "must end in .jsonl"),
                         (["--steps", "0", "--output", "x"], "--steps 0")]:
        assert words in refused(tiny.main, flags)


# -- PPO ---------------------------------------------------------------------------------

@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(4, 6, generator=g), torch.rand(4, 6, generator=g)
    lengths = [6, 1, 3, 5]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.gae(rewards, values * mask, mask, gamma, lam)
    for b, n in enumerate(lengths):
        r, V = rewards[b].tolist(), values[b, :n].tolist() + [0.0]
        deltas = [r[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        slow = [sum((gamma * lam)**(k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        assert advantages[b, :n].tolist() == pytest.approx(slow, abs=1e-5)
        assert returns[b, :n].tolist() == pytest.approx([A + v for A, v in zip(slow, V)], abs=1e-5)
        assert (advantages[b, n:] == 0).all() and (returns[b, n:] == 0).all()
    if gamma == lam == 1:  # then the return is the sum of the rewards that are left
        left = rewards[0].flip(0).cumsum(0).flip(0)
        assert returns[0].tolist() == pytest.approx(left.tolist(), abs=1e-5)

def test_whitened_advantages_have_mean_0_and_variance_1():
    mask = torch.arange(6) < torch.tensor([6, 1, 3])[:, None]
    values = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) * mask + 3.0 * mask
    white = ppo.whiten(values, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (white[~mask] == 0).all() and (ppo.whiten(torch.ones(3, 6) * mask, mask).abs() < 1e-3).all()

def test_value_loss_equals_the_slow_loop_with_gradients():
    g = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    values.requires_grad_()
    lengths, slow = [5, 2, 1], 0
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    for b, n in enumerate(lengths):
        for V, o, R in zip(values[b, :n], old[b], returns[b]):
            slow = slow + torch.maximum((V - R)**2, (torch.clamp(V, o - 0.5, o + 0.5) - R)**2) / 2 / 8
    loss, stats = ppo.value_loss(values, old, returns, mask, 8, 0.5)
    assert loss.item() == pytest.approx(slow.item()) and stats["value_loss"] == loss.item()
    assert torch.allclose(torch.autograd.grad(loss, values)[0], torch.autograd.grad(slow, values)[0])

def test_the_reward_comes_with_the_last_token(model):
    """An untrained critic says 0, so with gamma 0.5 a return halves at each token before the last."""
    batch = batch_of()
    batch.rewards = [1.0, 0.0] * 3 + [1.0]
    old_values, advantages, returns = ppo.token_advantages(ppo.Critic(model), batch, rl.Config(), 0.5, 1.0)
    for response, reward, values, own in zip(batch.responses, batch.rewards, old_values, returns):
        assert values.tolist() == len(response) * [0.0]
        assert own.tolist() == [reward / 2**k for k in reversed(range(len(response)))]
    white = torch.cat(advantages)
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and (white[:4].diff() > 0).all()

def test_values_do_not_depend_on_the_padding(model):
    critic = ppo.Critic(model)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    together, mask = critic(PROMPTS, RESPONSES)
    assert (together[~mask] == 0).all() and together[mask].abs().min() > 0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        alone, _ = critic([prompt], [response])
        assert torch.allclose(alone[0], together[i, :len(response)], atol=1e-5)

def test_two_processes_update_the_critic_as_one(model, monkeypatch):
    """Two processes with equal rollouts, whose sums are twice what each has, make the step of one alone."""
    returns = old_values = [torch.ones(len(response)) for response in RESPONSES]
    weights = []
    for processes in (1, 2):
        monkeypatch.setattr(rl, "sum_over_processes", lambda tensor: tensor.mul_(processes))
        critic = ppo.Critic(copy.deepcopy(model))
        optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
        ppo.update_critic(critic, optimizer, batch_of(), range(len(PROMPTS)), old_values, returns,
                          rl.Config(grad_clip=math.inf), 0.5)
        weights.append(critic.head.weight.detach())
    assert weights[0].abs().max() > 0.01 and torch.allclose(*weights, rtol=1e-5)

def test_packing_never_changes_the_critics_step(model):
    returns = old_values = [torch.ones(len(response)) for response in RESPONSES]
    weights = []
    for token_budget in (1, 20, 1000):
        critic = ppo.Critic(copy.deepcopy(model))
        optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
        ppo.update_critic(critic, optimizer, batch_of(), range(len(PROMPTS)), old_values, returns,
                          rl.Config(grad_clip=math.inf, token_budget=token_budget), 0.5)
        weights.append(critic.head.weight.detach())
    assert all(torch.allclose(weights[0], other, rtol=1e-4) for other in weights[1:])

@pytest.mark.parametrize("more", [[], ["--precision", "bf16", "--activation-checkpointing"]])
def test_ppo_runs_learns_values_and_resumes_to_the_bit(folder, tmp_path, easy_reward, refused, more):
    def run(*flags):
        ppo.main([*flags, "--critic-updates", "2", "--critic-learning-rate", "1e-2", "--lam", "0.9"])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*run_flags(folder, whole, *more))
    run(*run_flags(folder, cut, *more, "--steps", 2))
    run("--output-dir", str(cut), "--resume", "--steps", "4")
    assert comparable(cut) == comparable(whole)
    assert same_weights(cut / "step-000004", whole / "step-000004")
    assert not same_weights(folder, whole / "step-000004")
    values = [row["value"] for row in read_jsonl(whole / "metrics.jsonl")]
    assert abs(values[0]) < 0.2 < abs(values[-1])  # the critic has learned to expect something
    samples = read_jsonl(whole / "samples.jsonl")
    assert all(row["advantage"] != row["reward"] for row in samples)  # but the mean of its tokens'

def test_ppo_compiles_policy_reference_and_critic(folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(rl, "compile_layers", compiled.append)
    ppo.main([*run_flags(folder, tmp_path / "run", "--steps", 1, "--compile"), "--critic-updates", "2"])
    assert len({id(model) for model in compiled}) == 3

def test_ppo_refuses(folder, tmp_path, easy_reward, refused):
    ppo.main([*run_flags(folder, tmp_path / "run", "--steps", 2), "--critic-updates", "2"])
    resume = ["--output-dir", str(tmp_path / "run"), "--resume", "--steps", "3"]
    # one_shot_rlvr.py would go on without the critic
    assert "it holds policy, optimizer, critic" in refused(rl.main, resume)
    gc.collect()  # the lock of the folder goes with the run
    assert "same flags" in refused(ppo.main, [*resume, "--critic-updates", "2", "--gamma", "0.5"])
    flags = run_flags(folder, tmp_path / "new")
    assert "--critic-updates 3 must divide" in refused(ppo.main, [*flags, "--critic-updates", "3"])
    for flag in ("--critic-updates", "--critic-learning-rate", "--value-clip"):
        assert f"{flag} 0" in refused(ppo.main, [*flags, flag, "0"])
    assert not (tmp_path / "new").exists()


# -- Which example? ----------------------------------------------------------------------

def test_ranking_of_a_hand_made_history(tmp_path, capsys, refused):
    """Population standard deviation, ties in the order of the set; one never visited is not ranked."""
    accuracies = {"c": [0, 1, 0, 1], "always": [1, 1, 1], "learned": [0, 0.25, 0.75, 1], "tie": [1, 0],
                  "never": [0, 0, 0]}
    names = ["always", "never", "unseen", "tie", "c", "learned"]
    ranking = select_example.rank(accuracies, names)
    assert [row[0] for row in ranking] == ["tie", "c", "learned", "always", "never"]
    assert ranking[2][1:] == pytest.approx((math.sqrt((0.25 + 0.0625) / 2), 0.5, 4))
    run, best = tmp_path / "run", tmp_path / "new" / "best.jsonl"
    run.mkdir()
    rl.append_rows(tmp_path / "set.jsonl",
                   [{"name": name, "problem": f"{name}?", "answer": 1} for name in names])
    rl.write_json(run / "config.json", {"example": [str(tmp_path / "set.jsonl")]})
    steps = [{name: values[step] for name, values in accuracies.items() if step < len(values)}
             for step in range(4)]
    rl.append_rows(run / "metrics.jsonl", [{"step": 0, "eval": {}}, *({"examples": step} for step in steps)])
    select_example.main([str(run), "--top", "2", "--bottom", "1", "--output", str(best)])
    out = capsys.readouterr().out
    assert "5 of 6 examples were visited, 2 to 4 times each" in out
    assert re.search(r"3 +0\.395 +0\.500 +4 +learned +learned\?", out)
    assert [example["name"] for example in rl.load_examples([str(best)])] == ["tie", "c", "never"]
    select_example.main([str(run), "--show", "1"])
    assert re.findall(r"^ +(\d|\.\.\.)", capsys.readouterr().out, re.M) == ["1", "...", "5"]
    for flags, words in [([run, "--top", 1, "--output", best], "is already there"),
                         ([run, "--top", 1], "--output needs"), ([tmp_path / "no_run"], "no_run"),
                         ([run, "--top", -1], "--top -1"), ([], "or --probe"),
                         ([run, "--probe", "x"], "or --probe")]:
        assert words in refused(select_example.main, [str(flag) for flag in flags])

def test_a_run_on_a_set_can_be_ranked(folder, tmp_path, easy_reward, capsys):
    rl.append_rows(tmp_path / "set.jsonl", tiny.train_problems(3))
    rl.main(run_flags(folder, tmp_path / "run", "--example", tmp_path / "set.jsonl"))
    select_example.main([str(tmp_path / "run")])
    assert "3 of 3 examples were visited" in capsys.readouterr().out

@pytest.fixture
def generated(monkeypatch):
    """What rl.generate was called with, and what it returned."""
    calls, real = [], rl.generate

    def generate(model, prompts, **options):
        calls.append((prompts, options, real(model, prompts, **options)))
        return calls[-1][2]
    monkeypatch.setattr(rl, "generate", generate)
    return calls

def test_probe_ranks_by_nearness_to_30_percent(folder, tmp_path, monkeypatch, capsys):
    """Of four responses 0, 4, 1 and 2 are right: the third is first. One that is too long is left out."""
    right = {"never": 0, "always": 4, "one": 1, "two": 2}
    tokenizer, calls = AutoTokenizer.from_pretrained(folder), []
    texts = [f"\\boxed{{{7 if i < n else 8}}}" for n in right.values() for i in range(4)]
    responses = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    responses[8:10] = [response[:-1] for response in responses[8:10]]  # two are cut short
    monkeypatch.setattr(rl, "generate", lambda *args, **options: calls.append((args, options)) or responses)
    rows = [{"name": name, "problem": f"{name}?", "answer": 7} for name in right]
    rows.insert(2, {"name": "long", "problem": "long " * 250, "answer": 7})
    rl.append_rows(tmp_path / "set.jsonl", rows)
    output = tmp_path / "best.jsonl"
    select_example.main(["--probe", str(folder), "--example", str(tmp_path / "set.jsonl"), "--k", "4",
                         "--max-response-tokens", "32", "--top", "2", "--output", str(output)])
    out = capsys.readouterr().out
    table = [line.split() for line in out.partition("problem\n")[2].splitlines()]
    assert table[:4] == [["1", "25%", "100%", "50%", "one", "one?"],
                         ["2", "50%", "100%", "0%", "two", "two?"],
                         ["3", "0%", "100%", "0%", "never", "never?"],
                         ["4", "100%", "100%", "0%", "always", "always?"]]
    assert out.count("1 of 5 examples are left out") == 1
    assert [example["name"] for example in rl.load_examples([str(output)])] == ["one", "two"]
    [((_, prompts), options)] = calls  # one call for all
    asked = [tokenizer.decode(prompt) for prompt in prompts]
    assert all(f"{name}?{rl.TRAIN_SUFFIX}" in text for name, text in zip(right, asked[::4], strict=True))
    assert asked == [text for text in asked[::4] for _ in range(4)]
    assert options["temperature"] == 0.6 and options["max_response_tokens"] == 32

def test_probe_is_seeded_and_shows_all_examples(folder, generated, capsys):
    flags = ["--probe", str(folder), "--k", "2", "--max-response-tokens", "3"]
    for seed in (0, 0, 1):
        select_example.main([*flags, "--seed", str(seed)])
    first, again, other = (responses for _, _, responses in generated)
    assert first == again != other
    examples = json.loads((ROOT / "examples.json").read_text())
    out = capsys.readouterr().out
    left_out = int(re.search(f"(\\d+) of {len(examples)} examples are left out", out)[1])
    assert 0 < left_out < len(examples) and len(first) == 2 * (len(examples) - left_out)
    assert all(re.search(rf"0% +[0-9]+% +{name} ", out) for name in ("tiny-add", "tiny-eqn", "pi2"))

@pytest.mark.parametrize("flags, words", [
    (["--k", "0"], "--k 0"), (["--seed", "-1"], "--seed -1"), (["--example", "pi99"], "--example pi99"),
    (["--max-response-tokens", "256"], "no example is left"), (["--example", "EMPTY"], "row 2"),
    (["--probe", "FOLDER"], "cannot be loaded")])
def test_probes_that_are_refused(flags, words, folder, tmp_path, refused):
    (tmp_path / "set.jsonl").write_text(MINE + '{"problem": "", "answer": 1}')
    places = {"EMPTY": str(tmp_path / "set.jsonl"), "FOLDER": str(tmp_path)}
    flags = [places.get(flag, flag) for flag in flags]
    assert words in refused(select_example.main, ["--probe", str(folder), *flags])


# -- Which answers are right? ------------------------------------------------------------

def test_a_checker_that_pays_everything_is_shown_up(tmp_path, capsys, refused):
    checker.main([])
    rows = [line[42:].split() for line in capsys.readouterr().out.splitlines()]  # right, refused, wrong, ...
    kinds = {kind for kind, *_ in checker.answer_pairs()}
    assert len(rows) == 1 + len(kinds) + 1 and {(row[1], *row[3:5]) for row in rows[1:]} == {("0", "0", "0")}
    mine = tmp_path / "mine.py"
    mine.write_text("def is_correct(response, answer):\n    return 1 / ('x' not in answer)")
    checker.main([str(mine)])
    out = capsys.readouterr().out
    assert re.search(r"^tricks +0 +0 +([0-9]+) +\1 +0 .*\n    paid: 9", out, re.M)
    assert "    raised: 5  for  x=5 (ZeroDivisionError)\n" in out and "refused: " not in out
    mine.write_text("is_right = 1")
    assert "mine.py: no function is_correct" in refused(checker.main, [str(mine)])


# -- Tables and pictures -----------------------------------------------------------------

# instead of one_shot_rlvr.py: writes in no time what that would, up to the last test if it is to die
TRAINER = """import json, os, sys, time
run, dies = sys.argv[sys.argv.index("--output-dir") + 1], "--dies" in sys.argv and "--resume" not in sys.argv
if "--fails" in sys.argv:
    sys.exit(2)
with open(run + "/config.json", "w") as file:
    json.dump({"steps": 2}, file)
keys = ["reward", "accuracy", "entropy", "kl", "response_length", "truncated_frac", "dead_groups"]
with open(run + "/metrics.jsonl", "w") as file:
    for step in range(3):
        row, names = {"step": step, **dict.fromkeys(keys, step / 2)}, "add sub mul max mod eqn".split()
        test = {"average": step / 4, **{"tiny_" + name: step / 4 for name in names}}
        file.write((json.dumps(row) + "\\n") * (step > 0))
        file.write((json.dumps({"step": step, "eval": test}) + "\\n") * (step < 2 or not dies))
time.sleep(60 * ("--endless" in sys.argv))
sys.exit(7 * dies)
"""

@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """Put rows {name: flags} in the place of miniature's, and TRAINER in that of the trainer."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(miniature, "SETS", {"set-2.jsonl": 2})
    monkeypatch.setattr(rl, "make_tiny_base", lambda name: None)

    def put(**rows):
        trainer = f"{tmp_path}/trainer.py"
        rows = {name: (f"row {name}", "1.0", f"{trainer} {flags}") for name, flags in rows.items()}
        monkeypatch.setattr(miniature, "PARTS", {"part": ("Why?", "Table 0", rows),
                                                 "post": ("Then?", "", {"long": ("", "", trainer)})})
    return put

def test_miniature_makes_each_run_once(rows_of, tmp_path, monkeypatch, capsys, refused):
    """A run that is done is skipped, and one cut short goes on."""
    made, popen, out = [], subprocess.Popen, tmp_path / "mini"
    monkeypatch.setattr(subprocess, "Popen", lambda words, **kw: made.append(words) or popen(words, **kw))
    drawn = []
    monkeypatch.setattr(plot, "draw", lambda groups, output: drawn.append((groups, output.name)))
    flags = ["--output-dir", str(out), "--seeds", "1", "--jobs", "1"]
    rows_of(a="", b="--dies")
    assert "b-0 ended with exit code 7" in refused(miniature.main, [*flags, "--rows", "a", "b"])
    assert [words[-1] for words in made] == [f"{out}/a-0", f"{out}/b-0"]
    miniature.main(flags)
    assert made[2][-2:] == [f"{out}/b-0", "--resume"] and made[3][-1] == f"{out}/long-0"
    table = (out / "part.md").read_text()
    assert table.count("| the base model |  |  | 0.0 | 0 | 0 |") == 1 and table in capsys.readouterr().out
    assert f"| `a`: row a | 1.0 | 100.0 | 50.0 | {' | '.join(6 * ['50'])} |\n| `b`: row b |" in table
    assert "\n| 2 | 75.0 | 50.0 | 0.750 | 0.750 | 0.8 |" in (out / "post.md").read_text()
    assert len(read_jsonl(out / "set-2.jsonl")) == 2
    miniature.main([*flags, "--rows", "b"])
    assert len(made) == 4 and "`b`" in (out / "rows.md").read_text()
    assert (out / "part.md").read_text() == table  # of the whole part, still
    assert not drawn or drawn[-1] == ({"b": [out / "b-0"]}, "rows.png")  # not without matplotlib
    (out / "a-0" / "metrics.jsonl").write_text("")  # as if killed before its first row
    miniature.main([*flags, "--rows", "a"])
    assert made[4:] == [[*made[0], "--resume"]]

def test_miniature_ends_what_runs_beside_a_failure(rows_of, tmp_path, refused):
    rows_of(c="--endless", d="--fails", e="--endless")
    before = len(miniature.CHILDREN)
    flags = ["--output-dir", str(tmp_path / "my mini"), "--seeds", "1", "--jobs", "2", "--rows", "part"]
    line = refused(miniature.main, flags)
    assert f"--output-dir '{tmp_path}/my mini/d-0' ended with exit code 2" in line  # to copy as it stands
    assert {2} < {child.wait(60) for child in miniature.CHILDREN[before:]} <= {2, -signal.SIGTERM}
    assert "there are the rows c, d, e" in refused(miniature.main, ["--rows", "no_such_row"])
    assert "--jobs 0" in refused(miniature.main, ["--jobs", "0"])

def test_the_rows_of_miniature_are_flags_of_the_trainer(capsys):
    miniature.main(["--list"])
    listed = capsys.readouterr().out + "\n"
    for row in {row for _, _, of_part in miniature.PARTS.values() for row in of_part}:
        script, *flags = miniature.command(row, 1, "runs/my runs")
        config = rl.parse_args(flags)
        assert (ROOT / script).exists() and config.steps % config.eval_every == 0
        assert config.seed == 1 and config.output_dir == f"runs/my runs/{row}-1"
        assert f"python {script}" in listed and f"runs/miniature/{row}-0\n" in listed

def test_plot_and_table_of_real_runs(folder, tmp_path, easy_reward, capsys, monkeypatch):
    (tmp_path / "my.jsonl").write_text(MINE)
    for seed in (0, 1):
        rl.main(run_flags(folder, tmp_path / f"run-{seed}", "--seed", seed, "--eval", tmp_path / "my.jsonl",
                          "--eval-every", "2"))
    rl.main(run_flags(folder, tmp_path / "other"))
    monkeypatch.setattr(tiny, "BENCHMARKS", ("my",))
    accuracies = [read_jsonl(tmp_path / f"run-{seed}" / "metrics.jsonl")[-2]["accuracy"] for seed in (0, 1)]
    lines = miniature.table_of_rows({"run": ("what", "1.0", "")}, (0, 1), tmp_path)
    assert len(lines) == 4 and lines[-1].startswith(f"| `run`: what | 1.0 | {miniature.cell(accuracies)} | ")
    pytest.importorskip("matplotlib")
    runs = [str(tmp_path / run) for run in ("run-0", "run-1", "other")]
    plot.main([*runs, "--seeds", "--output", str(tmp_path / "new" / "plot.svg")])
    text = (tmp_path / "new" / "plot.svg").read_text()
    assert all(word in text for word in ("other (not tested)", "before training", "response length", ">run<"))

def test_bars_of_runs_that_were_tested_before_training_alone():
    figure = pytest.importorskip("matplotlib.figure")
    axis, test = figure.Figure().subplots(), {"x": 0.5, "average": 0.5}
    plot.draw_bars(axis, {"a": [([], {0: test, 2: test})],
                          "b": [([], {0: test, 2: test}), ([], {0: test})], "c": [([], {})]})
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before training", "a"]
    axis = figure.Figure().subplots()
    plot.draw_bars(axis, {"c": [([], {})]})
    assert axis.get_title().startswith("no test accuracy") and not axis.axison

def test_plot_says_what_it_lacks(tmp_path, refused, monkeypatch):
    assert ".png or .svg" in refused(plot.main, [str(tmp_path), "--output", "x.gif"])
    output = ["--output", str(tmp_path / "x.png")]
    assert "no metrics.jsonl" in refused(plot.main, [str(tmp_path), *output])
    rl.append_rows(tmp_path / "metrics.jsonl", [{"step": 1, "reward": 0.5}])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(plot.main, [str(tmp_path), *output])


# -- Speed -------------------------------------------------------------------------------

SMALL = "--shape tiny --rollouts 8 --max-response-tokens 6 --turns 1 --no-compile".split()

def table_of(out) -> dict:
    """{(part, name): the rest of its line}"""
    lines = (re.match("(rollouts|update|step) +(.*?)  +([0-9].*)", line) for line in out.splitlines())
    return {(line[1], line[2]): line[3] for line in lines if line}

@pytest.fixture
def known_machine(monkeypatch):
    monkeypatch.setattr(benchmark, "machine_speed", lambda device, dtype: (1e9, 1e9))

def test_speed_of_the_machine():
    bandwidth, rate = benchmark.machine_speed(torch.device("cpu"), torch.float32)
    assert 1e8 < bandwidth < 1e13 and 1e9 < rate < 1e14

def test_benchmark_prints_its_table(known_machine, capsys):
    benchmark.main([*SMALL, "--against", "generate"])
    table = table_of(capsys.readouterr().out)
    assert {*table} == {("rollouts", "ours"), ("rollouts", "generate"), ("update", "ours"), ("step", "ours")}
    assert "x as fast" in table["rollouts", "generate"] and table["step", "ours"].endswith("%")

def test_another_library_that_fails_is_left_out(known_machine, capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("not today")
    monkeypatch.setattr(benchmark, "continuous_batching", broken)
    benchmark.main([*SMALL, "--against", "continuous batching"])
    out = capsys.readouterr().out
    assert "continuous batching is left out: RuntimeError: not today\n" in out
    assert {name for _, name in table_of(out)} == {"ours"}
    monkeypatch.setattr(rl, "train_on", broken)
    with pytest.raises(RuntimeError, match="not today"):
        benchmark.main([*SMALL, "--against", "nothing"])

@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_benchmark_with_compiled_layers(known_machine, monkeypatch, capsys):
    """SLOW=1 pytest compiles them, which takes a minute."""
    if "SLOW" not in os.environ:
        monkeypatch.setattr(rl, "compile_layers", lambda model: print("compiled a layer in 0 s"))
    benchmark.main([*SMALL, "--compile", "--against", "nothing", "--activation-checkpointing"])
    out = capsys.readouterr().out
    assert "compiled a layer in" in out and "runs without" not in out and len(table_of(out)) == 6
    assert {name for _, name in table_of(out)} == {"ours", "ours, compiled layers"}

def test_the_twins_share_their_weights_and_ours_stays_as_it_is():
    policy, config = random_model(), rl.Config(precision="bf16")
    turns, sampler = benchmark.turns_of_ours(policy, [1], config, with_compiled=True)
    plain, compiled = (turn.args[:3] for turn in turns.values())
    assert plain[0] is policy and plain[2] is sampler and sampler.dtype == torch.bfloat16
    for ours, twin in zip(plain, compiled, strict=True):
        assert ours is not twin and all(a is b for a, b in zip(ours.parameters(), twin.parameters()))
        assert "forward" not in vars(ours.model.layers[0]) and "forward" in vars(twin.model.layers[0])

def test_benchmarks_that_are_refused_or_left_out(refused, monkeypatch, capsys):
    for flags, words in [(["--rollouts", "12"], "multiple of 8"), (["--turns", "0"], "--turns 0"),
                         (["--against", "vllm"], "--against vllm")]:
        assert words in refused(benchmark.main, flags)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(benchmark, "CUDA", False)
    assert not benchmark.parse_args(["--compile"]).compile
    assert "ours, compiled layers is left out" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "CUDA", True)  # there, continuous batching has few and short rollouts
    sizes = [(args.rollouts, args.max_response_tokens) for args in map(benchmark.parse_args, (
        ["--against", "continuous batching"], ["--against", "generate"], ["--rollouts", "64"]))]
    assert sizes == [(256, 1024), (1024, 3072), (64, 1024)]

def test_plan_keeps_within_each_gpus_memory(capsys):
    benchmark.main(["--plan"])
    lines = [line.strip("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[2:]]
    assert len(rows) == 3 * len(benchmark.GPUS) and {len(row) for row in rows} == {7}
    assert [row[:2] for row in rows if row[2] == "does not fit"] \
        == [["7B", name] for name in benchmark.GPUS if not name.startswith("141")]
    assert all(max(float(row[2]), float(row[3])) < float(row[1].split()[0]) for row in rows
               if row[2] != "does not fit")

def test_memory_of_the_weights():
    """Policy, gradients and AdamW's two in fp32 and the sampler in bf16; the reference is another in fp32."""
    policy = random_model()
    n = policy.num_parameters()
    with_kl, without, offloaded = (benchmark.memory(policy, rl.Config(**settings)) for settings in (
        {}, {"kl_coef": 0.0}, {"kl_coef": 0.0, "offload_optimizer": True}))
    for whole, less, least in zip(with_kl, without, offloaded):
        assert (whole - less) * 1e9 == pytest.approx(4 * n) and (less - least) * 1e9 == pytest.approx(8 * n)

def test_floors_by_hand():
    """One rollout of two tokens after a prompt of one, in a model small enough to count on paper."""
    policy = random_model(vocab_size=10)  # 2 layers, hidden 32, feed-forward 64, 4 heads of 8, 2 of keys
    body = 2 * (32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    config, lengths = rl.Config(slots=1, kl_coef=0.0), torch.tensor([2])
    keys = 2 + 3  # the second token sees one key more
    read = 4 * (2 * (body + 320) + keys * 2 * 2 * 2 * 8)
    assert benchmark.floors(policy, 4, 1, lengths, config, 1.0, 1e99)["rollouts"] == read
    operations = 2 * (body + 320) * 2 + keys * 2 * 2 * 32 * 2
    assert benchmark.floors(policy, 4, 1, lengths, config, 1e99, 1.0)["rollouts"] == operations
    forward = 2 * body * 3 + 2 * 320 * 2 + keys * 2 * 2 * 32 * 2
    assert benchmark.floors(policy, 4, 1, lengths, config, 1.0, 1.0)["update"] == 3 * forward

def test_activation_memory_is_what_backward_keeps():
    """Bytes that a layer saves under bf16 autocast, counted: a model of three layers less one of one."""
    kept, T = [], 96
    for layers in (1, 3):
        config = Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
                             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
        policy, saved = Qwen2ForCausalLM(config).eval(), {}
        weights = {p.shape for p in policy.parameters()}
        weights |= {p.T.shape for p in policy.parameters() if p.ndim == 2}

        def save(x):
            saved[x.untyped_storage().data_ptr()] = x
            return x
        hooks, ids = torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), torch.zeros(1, T).long()
        with hooks, torch.autocast("cpu", torch.bfloat16):
            hidden = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept.append(sum(x.untyped_storage().nbytes() for x in saved.values() if x.shape not in weights))
    assert (kept[1] - kept[0]) / 2 / T == benchmark.activations(config)
