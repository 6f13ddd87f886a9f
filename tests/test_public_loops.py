"""Loops as their authors write them, with three lines added: the record says what a computation by hand says."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from by_hand import ByHand, is_of_its_steps
from networks import convolutional_network, images, smooth_network, vectors
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from dynamics import Recorder, open_run


def agree_with_autograd(run: xr.DataTree, step: int, model: nn.Module, theta: list[Tensor], loss_of: Callable) -> None:
    """‖g‖², θᵀHg, gᵀHg and ΔθᵀHΔθ of a step, from double backward passes at the θ that was kept before it."""
    now = [parameter.detach().clone() for parameter in model.parameters()]
    update = [new - old for new, old in zip(now, theta, strict=True)]
    leaves = list(model.parameters())
    with torch.no_grad():
        for parameter, old in zip(leaves, theta, strict=True):
            parameter.copy_(old)
    grad = torch.autograd.grad(loss_of(), leaves, create_graph=True)
    values = [grad_part.detach() for grad_part in grad]
    along = torch.autograd.grad(grad, leaves, values, retain_graph=True)
    moved = torch.autograd.grad(grad, leaves, update)
    with torch.no_grad():
        for parameter, new in zip(leaves, now, strict=True):
            parameter.copy_(new)

    def dot(one: list[Tensor], other: list[Tensor]) -> float:
        return sum((a * b).sum().item() for a, b in zip(one, other, strict=True))

    row = run["curvature"].sel(step=step).to_dataset().sum("layer")
    expected = {
        "grad_sqnorm": dot(values, values), "param_hess_grad": dot(theta, along), "grad_hess_grad": dot(values, along),
        "grad_update": dot(values, update), "update_hess_update": dot(update, moved),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], value, rtol=1e-8, atol=1e-13, err_msg=name)


def theta_of(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.c_attn, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc, self.proj, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(8, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0)
        x = x + self.dropout(self.c_proj(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.proj(F.gelu(self.fc(self.ln_2(x)))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Dropout(0.1)
        self.h, self.ln_f, self.lm_head = (
            nn.ModuleList([Block()]),
            nn.LayerNorm(8),
            nn.Linear(8, 11, bias=False),
        )
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_nanogpt(tmp_path: Path) -> None:
    data, micro_steps = torch.randint(11, (400,)), 2

    def get_batch() -> tuple[Tensor, Tensor]:
        at = torch.randint(390, (4,))
        return torch.stack([data[i : i + 6] for i in at]), torch.stack([data[i + 1 : i + 7] for i in at])

    model = GPT()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    scaler, by_hand, losses, logged = torch.amp.GradScaler("cpu", enabled=False), ByHand(model), [], []
    with Recorder(
        tmp_path / "run", model, optimizer, objective=lambda model, batch: model(*batch)[1], curvature_every=2
    ) as recorder:
        X, Y = get_batch()
        for iteration in range(3):
            lr = 1e-2 * 0.5 * (1 + math.cos(math.pi * iteration / 3))
            for group in optimizer.param_groups:
                group["lr"] = lr
            total = 0.0
            for _ in range(micro_steps):
                recorder.observe((X, Y))
                with torch.autocast("cpu", torch.bfloat16, enabled=False):
                    _, loss = model(X, Y)
                    loss = loss / micro_steps
                X, Y = get_batch()
                scaler.scale(loss).backward()
                total += loss.item()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            by_hand.before()
            scaler.step(optimizer)
            by_hand.after()
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            if iteration % 2 == 0:
                recorder.log(loss=loss.item() * micro_steps)
            logged.append(loss.item() * micro_steps if iteration % 2 == 0 else np.nan)
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::2], rtol=1e-12)
    np.testing.assert_allclose(run["steps"].loss, logged, rtol=1e-12)
    assert np.isfinite(run["curvature"].grad_hess_grad).all()
    raw, applied = (run["curvature"][name].sum("layer") for name in ("grad_sqnorm", "applied_grad_sqnorm"))
    assert (raw > applied).all()


def test_timm(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = convolutional_network(dropout=0.2).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def soft_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (-batch[1] * F.log_softmax(model(batch[0]), dim=-1)).sum(-1).mean()

    by_hand, losses, last = ByHand(model), [], None
    with Recorder(tmp_path / "run", model, optimizer, objective=soft_cross_entropy, curvature_every=1) as recorder:
        for epoch in range(2):
            model.train()
            for x, labels in images(3, seed=epoch):
                mixed = np.random.default_rng(0).beta(0.8, 0.8)
                x.mul_(mixed).add_(x.flip(0) * (1 - mixed))
                hot = F.one_hot(labels, 3).double()
                target = hot * mixed + hot.flip(0) * (1 - mixed)
                x = x.contiguous(memory_format=torch.channels_last)
                recorder.observe((x, target))
                state, theta = torch.get_rng_state(), theta_of(model)
                output = model(x)
                loss = (-target * F.log_softmax(output, dim=-1)).sum(-1).mean()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                by_hand.before()
                scaler.step(optimizer)
                by_hand.after()
                scaler.update()
                optimizer.zero_grad()
                with torch.no_grad():
                    for average, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                        average.copy_(average * 0.9 + value * 0.1)
                recorder.log(loss=loss.item())
                losses.append(loss.item())
                last = state, theta, (x, target)
            scheduler.step()
            model.eval()
            with torch.no_grad():
                model(x), ema(x)
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    state, theta, batch = last
    model.train()

    def again() -> Tensor:
        torch.set_rng_state(state)
        return soft_cross_entropy(model, batch)

    agree_with_autograd(run, 5, model, theta, again)


def test_dcgan(tmp_path: Path) -> None:
    generator = nn.Sequential(
        nn.ConvTranspose2d(5, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 4, bias=False), nn.Tanh(),
    )  # fmt: skip
    critic = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4, 1, 4, bias=False),
        nn.Sigmoid(),
    )
    optimizerD = torch.optim.Adam(critic.parameters(), 0.01, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(generator.parameters(), 0.01, betas=(0.5, 0.999))
    criterion, ones, zeros = nn.BCELoss(), torch.ones(8), torch.zeros(8)

    def loss_of_critic(critic: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(critic(batch[0]).view(-1), ones) + criterion(critic(batch[1]).view(-1), zeros)

    def loss_of_generator(generator: nn.Module, noise: Tensor) -> Tensor:
        return criterion(critic(generator(noise)).view(-1), ones)

    losses, by_hands = ([], []), (ByHand(critic), ByHand(generator))
    with (
        Recorder(tmp_path / "D", critic, optimizerD, objective=loss_of_critic, curvature_every=1) as of_critic,
        Recorder(tmp_path / "G", generator, optimizerG, objective=loss_of_generator, curvature_every=1) as of_generator,
    ):
        for real, _ in images(3):
            critic.zero_grad()
            errD_real = criterion(critic(real).view(-1), ones)
            errD_real.backward()
            noise = torch.randn(8, 5, 1, 1)
            fake = generator(noise)
            of_critic.observe((real, fake.detach()))
            errD_fake = criterion(critic(fake.detach()).view(-1), zeros)
            errD_fake.backward()
            by_hands[0].before()
            optimizerD.step()
            by_hands[0].after()
            losses[0].append((errD_real + errD_fake).item())
            generator.zero_grad()
            of_generator.observe(noise)
            errG = criterion(critic(fake).view(-1), ones)
            errG.backward()
            by_hands[1].before()
            theta = theta_of(generator)
            optimizerG.step()
            by_hands[1].after()
            losses[1].append(errG.item())
            of_critic.log(loss=losses[0][-1])
            of_generator.log(loss=errG)
    for name, by_hand, expected in zip("DG", by_hands, losses, strict=True):
        run = open_run(tmp_path / name)
        by_hand.agrees_with(run["steps"])
        np.testing.assert_allclose(run["steps"].loss, expected, rtol=1e-12)
        np.testing.assert_allclose(run["curvature"].loss_before, expected, rtol=1e-12)
        np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-8)
    agree_with_autograd(run, 2, generator, theta, lambda: loss_of_generator(generator, noise))


@pytest.mark.parametrize("steps_of_critic", [1, 2])
def test_dcgan_with_both_networks_in_one_record(tmp_path: Path, steps_of_critic: int) -> None:
    networks = nn.ModuleDict({"D": smooth_network(), "G": nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))})
    critic, generator = networks["D"], networks["G"]
    optimizers = [torch.optim.SGD(critic.parameters(), 0.1), torch.optim.Adam(generator.parameters(), 0.01)]
    by_hand, rows = ByHand(networks), 0
    with Recorder(tmp_path / "run", networks, optimizers, curvature_every=0) as recorder:
        for real, _ in recorder.watch(vectors(3)):
            for _ in range(steps_of_critic):
                critic.zero_grad()
                fake = generator(torch.randn(16, 2))
                (critic(fake.detach()).exp().mean() - critic(real).mean()).backward()
                by_hand.before(list(critic.parameters()))
                optimizers[0].step()
                if rows % steps_of_critic < steps_of_critic - 1:
                    by_hand.after()
                rows += 1
            generator.zero_grad()
            (-critic(generator(torch.randn(16, 2))).mean()).backward()
            grads, theta = by_hand.grad, by_hand.theta
            by_hand.before(list(generator.parameters()))
            by_hand.grad = {name: grad + grads[name] for name, grad in by_hand.grad.items()}
            by_hand.theta = theta
            optimizers[1].step()
            by_hand.after()
    by_hand.agrees_with(open_run(tmp_path / "run")["steps"])


def test_word_language_model(tmp_path: Path) -> None:
    class RNNModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(9, 6)
            self.rnn, self.decoder = nn.LSTM(6, 5, 2, dropout=0.2), nn.Linear(5, 9)

        def forward(self, data: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            output, hidden = self.rnn(self.drop(self.encoder(data)), hidden)
            return F.log_softmax(self.decoder(self.drop(output)).view(-1, 9), dim=1), hidden

    model, source = RNNModel(), torch.randint(9, (22, 4))
    optimizer, criterion = torch.optim.SGD(model.parameters(), 1.0), nn.NLLLoss()
    by_hand, losses = ByHand(model), []
    hidden = (torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))
    with Recorder(
        tmp_path / "run", model, optimizer, curvature_every=1,
        objective=lambda model, batch: criterion(model(batch[0], batch[2])[0], batch[1]),
    ) as recorder:  # fmt: skip
        for i in range(0, 20, 5):
            data, targets = source[i : i + 5], source[i + 1 : i + 6].reshape(-1)
            model.zero_grad()
            hidden = tuple(part.detach() for part in hidden)
            recorder.observe((data, targets, hidden))
            state, theta, given = torch.get_rng_state(), theta_of(model), hidden
            output, hidden = model(data, hidden)
            loss = criterion(output, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            by_hand.before()
            optimizer.step()
            by_hand.after()
            losses.append(loss.item())
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)

    def again() -> Tensor:
        torch.set_rng_state(state)
        return criterion(model(data, given)[0], targets)

    agree_with_autograd(run, 3, model, theta, again)


def test_reinforce(tmp_path: Path) -> None:
    policy, by_hand = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), None
    optimizer, by_hand, rewards_of = torch.optim.Adam(policy.parameters(), 1e-2), ByHand(policy), []
    with Recorder(tmp_path / "run", policy, optimizer, curvature_every=0) as recorder:
        for episode in range(4):
            state, log_probs, rewards = torch.randn(4), [], []
            for _ in range(5 + episode):
                distribution = torch.distributions.Categorical(logits=policy(state))
                action = distribution.sample()
                log_probs.append(distribution.log_prob(action))
                state = state * 0.9 + torch.randn(4) * (action - 0.5)
                rewards.append(float(state[0]))
            returns = torch.tensor(rewards).flip(0).cumsum(0).flip(0)
            loss = torch.stack([-p * r for p, r in zip(log_probs, returns, strict=True)]).sum()
            optimizer.zero_grad()
            loss.backward()
            by_hand.before()
            optimizer.step()
            by_hand.after()
            recorder.log(reward=sum(rewards), loss=loss)
            rewards_of.append(sum(rewards))
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].reward, rewards_of, rtol=1e-12)


def test_ppo(tmp_path: Path) -> None:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = smooth_network(), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

        def act(self, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            distribution = torch.distributions.Categorical(logits=self.actor(x))
            return distribution.log_prob(action), distribution.entropy(), self.critic(x)

    def loss_of(agent: Agent, batch: tuple[Tensor, ...]) -> Tensor:
        obs, actions, old, advantages, returns = batch
        new, entropy, value = agent.act(obs, actions)
        ratio = (new - old).exp()
        policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()
        return policy - 0.01 * entropy.mean() + 0.25 * (value.view(-1) - returns).square().mean()

    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2, eps=1e-5)
    by_hand, losses, kept = ByHand(agent), [], None
    with Recorder(tmp_path / "run", agent, optimizer, objective=loss_of, curvature_every=3) as recorder:
        for update in range(2):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - update / 2)
            obs, actions = torch.randn(32, 4), torch.randint(3, (32,))
            with torch.no_grad():
                old = agent.act(obs, actions)[0]
            advantages, returns, order = torch.randn(32), torch.randn(32), np.arange(32)
            for _ in range(2):
                np.random.default_rng(update).shuffle(order)
                for start in range(0, 32, 8):
                    at = order[start : start + 8]
                    batch = obs[at], actions[at], old[at], advantages[at], returns[at]
                    recorder.observe(batch)
                    loss = loss_of(agent, batch)
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                    by_hand.before()
                    theta = theta_of(agent)
                    optimizer.step()
                    by_hand.after()
                    losses.append(loss.item())
                    recorder.log(loss=loss)
                    if len(losses) == 16:
                        kept = theta, batch
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses[::3], rtol=1e-12)
    agree_with_autograd(run, 15, agent, kept[0], lambda: loss_of(agent, kept[1]))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is published: two steps around two backward passes."""

    def __init__(self, params: object, base: type, rho: float = 0.05, **settings: float) -> None:
        super().__init__(params, dict(rho=rho, **settings))
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.norm(torch.stack([p.grad.norm() for p in parameters]))
        for p in parameters:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * 0.05 / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def test_sam_steps_by_its_base_optimizer(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    said = "of one that steps through another, as SAM does, pass the inner one, its base_optimizer"
    with pytest.warns(UserWarning, match=said):
        with Recorder(tmp_path / "run", model, optimizer) as recorder:
            for inputs, labels in recorder.watch(vectors(2)):
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.first_step(zero_grad=True)
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("way", ["two steps", "closure"])
def test_sam(tmp_path: Path, way: str) -> None:
    model = smooth_network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    losses, updates, squares = [], [], []
    hung_on = optimizer.base_optimizer if way == "two steps" else optimizer
    with Recorder(tmp_path / "run", model, hung_on, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(vectors(4)):
            theta = theta_of(model)
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            recorder.log(loss=loss)
            if way == "two steps":
                optimizer.first_step(zero_grad=True)
                F.cross_entropy(model(inputs), labels).backward()
                squares.append(sum(p.grad.square().sum().item() for p in model.parameters()))
                optimizer.second_step(zero_grad=True)
            else:

                def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                    loss = F.cross_entropy(model(inputs), labels)
                    loss.backward()
                    squares.append(sum(p.grad.square().sum().item() for p in model.parameters()))
                    return loss

                optimizer.step(closure)
                optimizer.zero_grad()
            losses.append(loss.item())
            moved = [new - old for new, old in zip(theta_of(model), theta, strict=True)]
            updates.append(sum(part.square().sum().item() for part in moved))
    run = open_run(tmp_path / "run")
    steps = run["steps"].to_dataset().sum("layer")
    np.testing.assert_allclose(run["steps"].loss, losses, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    np.testing.assert_allclose(steps.grad_sqnorm, squares, rtol=1e-12)
    np.testing.assert_allclose(steps.update_sqnorm, updates, rtol=1e-10)
    agree_with_autograd(run, 3, model, theta, lambda: F.cross_entropy(model(inputs), labels))


def encoder_and_decoder(tmp_path: Path) -> list[float]:
    """As in PyTorch's tutorial on translation: two networks, an optimizer each, and here a recorder each."""
    torch.manual_seed(0)
    encoder, decoder = nn.GRU(4, 6, batch_first=True).double(), nn.Linear(6, 3).double()
    pairs = [(one, torch.optim.SGD(one.parameters(), 0.5)) for one in (encoder, decoder)]

    def loss_of(encoder: nn.Module, decoder: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(decoder(encoder(batch[0])[0][:, -1]), batch[1])

    objectives = [lambda one, batch: loss_of(one, decoder, batch), lambda one, batch: loss_of(encoder, one, batch)]
    recorders = [
        Recorder(tmp_path / name, *pair, objective=objective, curvature_every=1)
        for name, pair, objective in zip(("encoder", "decoder"), pairs, objectives, strict=True)
    ]
    batches, losses = [(torch.randn(5, 3, 4).double(), torch.randint(3, (5,))) for _ in range(5)], []
    for batch in recorders[1].watch(recorders[0].watch(batches)):
        for _, optimizer in pairs:
            optimizer.zero_grad()
        loss = loss_of(encoder, decoder, batch)
        loss.backward()
        losses.append(loss.item())
        for _, optimizer in pairs:
            optimizer.step()
    for recorder in recorders:
        recorder.close()
    return losses


def test_another_network_that_has_stepped_before_is_as_it_was_in_the_forward_pass(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a network outside the model that the objective runs changes between"):
        losses = encoder_and_decoder(tmp_path)
    found = {name: open_run(tmp_path / name)["curvature"] for name in ("encoder", "decoder")}
    np.testing.assert_allclose(found["encoder"].loss_before, losses, rtol=1e-12)
    assert found["decoder"].step.values.tolist() == [1, 2, 3, 4]  # the encoder is the larger one: at first not kept
    np.testing.assert_allclose(found["decoder"].loss_before, losses[1:], rtol=1e-12)


def test_a_generator_that_steps_first_and_runs_again_for_the_discriminator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = nn.Linear(3, 4).double()
    discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizers = [torch.optim.SGD(one.parameters(), 0.5) for one in (generator, discriminator)]
    losses: list[float] = []

    def objective(discriminator: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, noise = batch
        return F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(generator(noise).detach())).mean()

    batches = [(torch.randn(6, 4).double(), torch.randn(6, 3).double()) for _ in range(5)]
    with Recorder(tmp_path / "run", discriminator, optimizers[1], objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            optimizers[0].zero_grad()
            F.softplus(-discriminator(generator(batch[1]))).mean().backward()
            optimizers[0].step()
            optimizers[1].zero_grad()
            loss = objective(discriminator, batch)
            loss.backward()
            optimizers[1].step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_maml_by_vmap_over_tasks(tmp_path: Path) -> None:
    """As in PyTorch's tutorials on torch.func: the network runs inside of vmap and grad."""
    model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.05), []

    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        theta = dict(model.named_parameters())

        def squared_error(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(functional_call(model, theta, (x,)), y)

        def of_task(x: Tensor, y: Tensor, queries: Tensor, answers: Tensor) -> Tensor:
            slope = grad(squared_error)(theta, x, y)
            return squared_error({name: one - 0.1 * slope[name] for name, one in theta.items()}, queries, answers)

        return vmap(of_task)(*batch).mean()

    with Recorder(tmp_path / "run", model, optimizer, objective=loss_of, curvature_every=1) as recorder:
        for _ in range(3):
            batch = [torch.randn(2, 4, 1) for _ in range(4)]
            recorder.observe(batch)
            theta = theta_of(model)
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-12)
    agree_with_autograd(run, 2, model, theta, lambda: loss_of(model, batch))


def test_a_network_that_only_torch_func_runs_drops_out_what_the_step_did(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []

    def loss_of(theta: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, theta, (inputs,)), labels)

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            torch.rand(5)  # the loop's own
            grads, loss = grad_and_value(loss_of)(dict(model.named_parameters()), *batch)
            for name, parameter in model.named_parameters():
                parameter.grad = grads[name]
            optimizer.step()
            losses.append(loss.item())
    is_of_its_steps(tmp_path / "run", losses)


@pytest.mark.parametrize("shares", [(0.9,), (0.9, 0.8)])
def test_a_network_that_runs_with_other_parameters_too_keeps_its_own(tmp_path: Path, shares: tuple[float, ...]) -> None:
    """As a teacher of averages by functional_call: its parameters are in the network while it runs, and gone then."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        said = [
            functional_call(
                model, {name: nn.Parameter(share * one.detach()) for name, one in model.named_parameters()}, batch[0]
            ).detach()
            for share in shares
        ]
        answers = model(batch[0])
        return F.cross_entropy(answers, batch[1]) + sum(F.mse_loss(answers, one) for one in said)

    with Recorder(tmp_path / "run", model, optimizer, objective=loss_of, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(3)):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    is_of_its_steps(tmp_path / "run", losses)


def test_trades(tmp_path: Path) -> None:
    """Its loss attacks the network in eval mode, and sets the gradients to zero itself: the step's stay."""
    model, grads = convolutional_network(dropout=0.2), {}

    def trades_loss(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        model.eval()
        apart = nn.KLDivLoss(reduction="batchmean")
        attacked = x.detach() + 0.001 * torch.randn_like(x)
        for _ in range(2):
            attacked.requires_grad_()
            away = apart(F.log_softmax(model(attacked), dim=1), F.softmax(model(x), dim=1))
            slope = torch.autograd.grad(away, attacked)[0]
            attacked = torch.min(torch.max(attacked.detach() + 0.01 * slope.sign(), x - 0.03), x + 0.03)
        model.train()
        optimizer.zero_grad()
        robust = apart(F.log_softmax(model(attacked), dim=1), F.softmax(model(x), dim=1))
        return F.cross_entropy(model(x), y) + 6 * robust

    def train(recorder: Recorder | None, optimizer: torch.optim.Optimizer) -> list[float]:
        torch.manual_seed(1)
        losses = []
        for x, y in recorder.watch(images(3)) if recorder else images(3):
            loss = trades_loss(model, x, y, optimizer)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            grads.setdefault(recorder is None, []).extend(one.grad.clone() for one in model.parameters())
        return losses

    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bare = train(None, optimizer)
    model.load_state_dict(start)
    with Recorder(
        tmp_path / "run", model, optimizer, curvature_every=1,
        objective=lambda model, batch: trades_loss(model, *batch, optimizer),
    ) as recorder:  # fmt: skip
        assert train(recorder, optimizer) == bare
    assert all(map(torch.equal, grads[True], grads[False]))
    curvature = open_run(tmp_path / "run")["curvature"]
    np.testing.assert_allclose(curvature.loss_before, bare, rtol=1e-12)
    np.testing.assert_allclose(curvature.grad_sqnorm, curvature.applied_grad_sqnorm, rtol=1e-9)
