"""PPO instead of GRPO: a critic says what to expect of each token, in the place of the group's mean reward.

    python labs/ppo.py --preset tiny --output-dir runs/ppo             # takes all flags of one_shot_rlvr.py
    python labs/ppo.py --example pi1 --model Qwen/Qwen2.5-Math-1.5B    # the paper: 72.4 on MATH500; GRPO 72.8

What differs from one_shot_rlvr.py, and nothing else does:
    1. Critic       a copy of the model, with one number in place of the logits before each response token
    2. Advantages   generalised advantage estimation (GAE) from rewards and values, whitened over the tokens
    3. Value loss   squared error to the returns, clipped around the old values; it has its own optimizer
Compare main() with that of one_shot_rlvr.py: the loss of the policy is the same, with an advantage for each
token. The defaults are the released code's, but for the KL: there, PPO takes it off the reward; here it
stays in the loss, as in GRPO. With gamma = lambda = 1 the advantage before whitening is reward - value; a
critic that knew only the mean reward would give GRPO's reward - mean, and whitening divides by the standard
deviation of the batch in place of the group's.

Logs are those of GRPO, with value_loss and value in metrics.jsonl; the advantage of a rollout is the mean of
its tokens'; a dead group is not lost, because the critic need not expect its reward. The critic takes as much
memory as the policy again: for 1.5B on 80 GB add --slots 128 --activation-checkpointing (worked out, not
run). --offload-optimizer acts on the policy alone.
"""
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import one_shot_rlvr as rl  # before torch, as in evaluate.py

import torch
from torch.nn.utils.rnn import pad_sequence


# -- 1. Critic ---------------------------------------------------------------------------

class Critic(torch.nn.Module):
    """The backbone of a model, and a head that starts at zero: at first every response is worth nothing."""

    def __init__(self, model):
        super().__init__()
        self.model = model.base_model
        self.head = torch.nn.Linear(model.config.hidden_size, 1, device=model.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, prompts, responses):
        """Value before each response token, and the mask of these tokens: (B, T) and 0 after the end."""
        hidden, _, mask = rl.hidden_states(self.model, prompts, responses)
        with torch.autocast(hidden.device.type, enabled=False):  # a bf16 value has three digits
            values = self.head(hidden.float()).squeeze(1)  # (M,)
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values), mask

def score(critic, batch, rows, config):
    """Values and mask of some rows, in the precision in which the policy is scored."""
    device = critic.model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=rl.uses_bf16(device, config)):
        return critic([batch.prompts[i] for i in rows], [batch.responses[i] for i in rows])


# -- 2. Advantages -----------------------------------------------------------------------

def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Rewards and values of response tokens (B, T) -> advantages, returns (B, T) (Schulman et al., 2016).

    delta_t = r_t + gamma V_{t+1} - V_t, with no value after the last token; A_t = sum over l of
    (gamma lam)^l delta_{t+l}; the return, which the critic shall predict, is A_t + V_t.
    """
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = (rewards + gamma * next_values - values) * mask
    advantages, later = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        advantages[:, t] = later = deltas[:, t] + gamma * lam * later
    return advantages, (advantages + values) * mask

def whiten(advantages, mask):
    """Mean 0 and variance 1 over all tokens (of all processes), 0 elsewhere: (B, T) -> (B, T)."""
    n, total, squares = rl.sum_over_processes(torch.stack(
        [mask.sum(), (advantages * mask).sum(), (advantages.square() * mask).sum()]).double())
    mean = total / n
    variance = (squares / n - mean.square()).clamp(min=0)
    return ((advantages - mean) * (variance + 1e-8).rsqrt() * mask).float()

def token_advantages(critic, batch, config, gamma, lam) -> tuple:
    """Old values, advantages and returns of each rollout, lists of (T,)."""
    N, old_values = len(batch.prompts), [None] * len(batch.prompts)
    with torch.no_grad():
        for rows in rl.micro_batches(batch, range(N), config.token_budget):
            for i, values, mask in zip(rows, *score(critic, batch, rows, config)):
                old_values[i] = values[mask]
    values = pad_sequence(old_values, batch_first=True)  # (N, T)
    lengths = torch.tensor([len(response) for response in batch.responses], device=values.device)
    mask = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    rewards = torch.zeros_like(values)  # the reward comes with the last token
    rewards[range(N), lengths - 1] = torch.tensor(batch.rewards, device=values.device)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    advantages = whiten(advantages, mask)
    return old_values, *([row[kept] for row, kept in zip(x, mask)] for x in (advantages, returns))


# -- 3. Value loss -----------------------------------------------------------------------

def value_loss(values, old_values, returns, mask, num_tokens, clip):
    """1/2 max((V - R)^2, (clip(V, old V +- clip) - R)^2), the mean over tokens -> (scalar, stats)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()  # (B, T)
    loss = 0.5 * (torch.max(error, clipped_error) * mask).sum() / num_tokens
    return loss, {"value_loss": loss.detach(), "value": (values.detach() * mask).sum() / num_tokens}

def update_critic(critic, optimizer, batch, rollouts, old_values, returns, config, clip) -> dict:
    """One optimizer step of the critic -> stats; as update_policy, but of another loss."""
    device, stats = critic.model.device, defaultdict(float)
    num_tokens = sum(len(batch.responses[i]) for i in rollouts)
    num_tokens = int(rl.sum_over_processes(torch.tensor(num_tokens, device=device)))
    for rows in rl.micro_batches(batch, rollouts, config.token_budget):
        values, mask = score(critic, batch, rows, config)
        loss, parts = value_loss(values, rl.padded(old_values, rows, device),
                                 rl.padded(returns, rows, device), mask, num_tokens, clip)
        loss.backward()
        for name, value in parts.items():
            stats[name] += value
    for tensor in (*(param.grad for param in critic.parameters()), *stats.values()):
        rl.sum_over_processes(tensor)
    torch.nn.utils.clip_grad_norm_(critic.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return {name: float(value) for name, value in stats.items()}


# -- The run -----------------------------------------------------------------------------

def parse_args(argv=None) -> tuple:
    """The flags of PPO and, in a Config, those of one_shot_rlvr.py."""
    parser = rl.make_parser(__doc__, epilog="All other flags are those of one_shot_rlvr.py.")
    parser.add_argument("--gamma", type=float, default=1.0, help="discount of later rewards (default: 1)")
    parser.add_argument("--lam", type=float, default=1.0, help="lambda of GAE (default: 1)")
    parser.add_argument("--critic-learning-rate", type=float, help="default: 1e-5, in the tiny world 1e-3")
    parser.add_argument("--critic-updates", type=int, default=8,
                        help="steps of the critic on each batch, each on another part of it (default: 8)")
    parser.add_argument("--value-clip", type=float, default=0.5, help="how far a value moves (default: 0.5)")
    flags, others = parser.parse_known_args(rl.words_of(argv))
    config = rl.parse_args(others)
    rl.check_numbers(vars(flags), {"gamma": 0, "lam": 0, "critic_learning_rate": 1e-30, "value_clip": 1e-30})
    if config.prompts_per_step % flags.critic_updates:
        rl.fail(f"--critic-updates {flags.critic_updates} must divide --prompts-per-step "
                f"{config.prompts_per_step}")
    if config.resume:
        saved = rl.read_json(Path(config.output_dir, "config.json")).get("ppo", "GRPO")
        if saved != vars(flags):
            rl.fail(f"--resume: {config.output_dir} was made with {saved}; give the same flags")
    return flags, config

def main(argv=None) -> None:
    flags, config = parse_args(argv)
    run = rl.set_up(config)
    critic = Critic(rl.load_model(config.model)[0])
    if config.compile:
        rl.compile_layers(critic.model)
    if config.activation_checkpointing:
        rl.recompute_layers(critic.model)
    learning_rate = flags.critic_learning_rate or (1e-3 if config.preset == "tiny" else 1e-5)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=learning_rate, weight_decay=config.weight_decay)
    run.parts.update(critic=critic, critic_optimizer=optimizer)  # of a checkpoint
    run.facts["ppo"] = vars(flags)  # in config.json
    for step in rl.steps_to_make(run):
        # 1. Example, 2. Rollouts, 3. Reward: as in GRPO
        batch = rl.sample_rollouts(run, step)
        started = time.time()
        # 4. Advantages: of each token, from the critic
        old_values, advantages, returns = token_advantages(critic, batch, config, flags.gamma, flags.lam)
        # 5. Loss, 6. Update: of the policy as in GRPO, then of the critic
        stats = defaultdict(float, rl.train_on(run.policy, run.ref_policy, run.optimizer, batch, advantages,
                                               config))
        for rollouts in torch.arange(len(batch.prompts)).chunk(flags.critic_updates):
            for name, value in update_critic(critic, optimizer, batch, rollouts.tolist(), old_values, returns,
                                             config, flags.value_clip).items():
                stats[name] += value / flags.critic_updates
        rl.copy_weights(run.policy.parameters(), run.sampler.parameters())
        means = [advantage.mean() for advantage in advantages]  # one number a rollout, for its log
        rl.log_step(run, step, batch, means, stats, time.time() - started)

if __name__ == "__main__":
    rl.as_a_command(main)
