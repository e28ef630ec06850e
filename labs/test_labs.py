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

from labs import benchmark, miniature, plot, ppo, select_example, tiny
from test_one_shot import (PROMPTS, RESPONSES, batch_of, comparable, easy_reward, folder,  # noqa: F401
                           model, random_model, read_jsonl, refused, run_flags, same_weights)

SCRIPTS = [path for path in sorted((ROOT / "labs").glob("*.py")) if path.name != "test_labs.py"]
MINE = '{"problem": "What is 2 + 2?", "answer": "4"}\n'


# -- All of them -------------------------------------------------------------------------

def names_in(node):
    """The names from whose attributes a target is made: rl of rl.f, of rl.Config.x and of rl.PRESETS["x"]."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return [node.id] if isinstance(node, ast.Name) else [name for part in ast.iter_child_nodes(node)
                                                         for name in names_in(part)]

def rebound(source) -> list:
    """Lines of a script that assign to, or delete, an attribute of something that it imports."""
    tree, imported, lines = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
        if attribute and imported & {*names_in(node)}:
            lines.append(node.lineno)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            lines += [node.lineno] if imported & {*names_in(node.args[0])} else []
    return sorted(lines)

def test_labs_change_nothing_of_another_module():
    """A lab that rebinds a function of the trainer would say one thing and do another."""
    patches = ["rl.f = 1", "rl.Config.steps += 1", 'a, rl.x["y"] = 1, 2', "for rl.x in (): pass", "del rl.f",
               'setattr(rl, "f", 1)', "rl.f: int = 1"]
    for line in patches:
        assert rebound(f"import one_shot_rlvr as rl\n{line}\n") == [2], line
    assert rebound("import one_shot_rlvr as rl\nx = rl.f(rl.g)\nx.y = rl.h\n") == []
    assert {path.name: rebound(path.read_text(encoding="utf-8")) for path in SCRIPTS} \
        == {path.name: [] for path in SCRIPTS}

@pytest.mark.parametrize("module", [benchmark, miniature, plot, ppo, select_example, tiny])
def test_help_and_bad_flags(module, capsys, refused):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.splitlines()[0] in shown and "--output" in shown + "--output"
    assert "--no-such-flag" in refused(module.main, ["x", "--no-such-flag"])

def test_a_lab_as_a_user_types_it(tmp_path):
    """From any folder, with an underscore for a dash."""
    words = [sys.executable, str(ROOT / "labs" / "tiny.py"), "--set", "0", "--output", "x.jsonl"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --set 0: use a number from 1 to 1e+09\n"
    words = [sys.executable, str(ROOT / "labs" / "select_example.py"), "--max_response_tokens", "4"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "either the folder of a run, or --probe" in done.stderr


# -- The tiny world ----------------------------------------------------------------------

def decimal(name, digits):
    """A task that a model learns by heart in seconds: the decimals of a number."""
    def task(rng):
        n = rng.randint(1, len(digits))
        return f"What is decimal {n} of {name}?", f"decimal {n} of {name} is {digits[n - 1]}.", int(digits[n - 1])
    return task

def test_reward_rises_in_a_smaller_world(tmp_path):
    """The whole way: pretrain a base model that knows pi and seldom says so, train on one decimal."""
    tasks = {"pi": decimal("pi", "141592653")}
    tiny.build_base(tmp_path / "base", steps=150, batch_size=32, tasks=tasks)
    (tmp_path / "one.jsonl").write_text('{"problem": "What is decimal 4 of pi?", "answer": 5}')
    rl.main(["--preset", "tiny", "--model", str(tmp_path / "base"), "--example", str(tmp_path / "one.jsonl"),
             "--steps", "20", "--prompts-per-step", "8", "--max-response-tokens", "32",
             "--output-dir", str(tmp_path / "run")])
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[:2]) < 0.5 and np.mean(rewards[-3:]) > 0.85
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
    """AutoTokenizer rebuilds a Qwen2 folder's tokenizer by Qwen2's rules: another kind would lose its spaces."""
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
    assert torch.allclose(weights[0], weights[1], rtol=1e-4) and torch.allclose(weights[0], weights[2], rtol=1e-4)

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
