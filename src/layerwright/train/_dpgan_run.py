"""One training of a text GAN: models, optimizers, draws, history."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.train._dpgan_config import DivergedError, DPGANConfig, DPGANHistory
from layerwright.train._dpgan_rewards import Judge, Writer, discriminator_loss, dpgan_returns, generator_sample
from layerwright.train._dpgan_state import fill_optimizer_, flat_optimizer, read_state, write_state

__all__ = ["Run"]

_MLE_SCALE = 10.0
"""What the original code divides the surprise of real text by."""
_BASELINE_DECAY = 0.9


class Run:
    """The state of one training: models, optimizers, draws, history."""

    def __init__(
        self,
        generator: Writer,
        discriminator: Judge,
        data: Tensor,
        config: DPGANConfig,
        heldout: Tensor | None,
        evaluate: Callable[[Tensor], Mapping[str, float]] | None,
        folder: Path | None,
    ) -> None:
        self.generator, self.discriminator, self.data, self.config = generator, discriminator, data, config
        self.heldout = data if heldout is None else heldout
        self.evaluate, self.folder = evaluate, folder
        # The port steps maximum likelihood and the policy gradient with two optimizers of their own moments.
        rates = {"mle": config.g_lr, "policy": config.g_lr, "judge": config.d_lr}
        owners: dict[str, Writer | Judge] = {"mle": generator, "policy": generator, "judge": discriminator}
        fused = data.device.type in ("cpu", "cuda")
        self.optimizers = {
            name: torch.optim.Adam(owners[name].parameters(), lr=rate, fused=fused) for name, rate in rates.items()
        }
        self.rates, self.steps = rates, dict.fromkeys(rates, 0)
        self.draw = torch.Generator(device=data.device).manual_seed(config.seed)
        self.baseline: Tensor | None = None
        self.phase: str = ""
        self.epoch = 0
        self.history = DPGANHistory()

    def _step(self, name: str, loss: Tensor, share: float = 1.0) -> float:
        """One step of an optimizer at `share` of its rate; returns the loss."""
        if not torch.isfinite(loss):
            raise DivergedError(
                f"{self.phase} epoch {self.epoch}: the {name} loss is {float(loss.detach())}; lower g_lr or d_lr, or set clip=12"
            )
        optimizer, warmup = self.optimizers[name], self.config.warmup_steps
        self.steps[name] += 1
        rising = min(1.0, self.steps[name] / warmup) if warmup else 1.0
        for group in optimizer.param_groups:
            group["lr"] = self.rates[name] * rising * share
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        owner = self.discriminator if name == "judge" else self.generator
        nn.utils.clip_grad_norm_(owner.parameters(), self.config.max_grad_norm)
        optimizer.step()
        return float(loss.detach())

    def _batches(self) -> list[Tensor]:
        order = torch.randperm(len(self.data), generator=self.draw, device=self.data.device)
        return list(self.data[order].split(self.config.batch))

    def mle_epoch(self) -> dict[str, float]:
        writer, losses = self.generator, []
        for real in self._batches():
            losses.append(self._step("mle", -writer.word_log_probs(real).mean()))
        return {"mle_loss": sum(losses) / len(losses)}

    def discriminator_step(self, epochs: int) -> dict[str, float]:
        """Draw negatives once and train the discriminator on them for some epochs."""
        config, count = self.config, min(self.config.d_samples or len(self.data), len(self.data))
        real = self.data[torch.randperm(len(self.data), generator=self.draw, device=self.data.device)[:count]]
        generated, _ = self.generator.sample(count, self.draw)
        whole = count // config.batch * config.batch
        for _ in range(epochs):
            for pair in zip(real[:whole].split(config.batch), generated[:whole].split(config.batch), strict=True):
                self._step("judge", discriminator_loss(self.discriminator, *pair, config.clip))
        with torch.no_grad():
            values = [float(self.discriminator.reward(x[: 4 * config.batch])[1].mean()) for x in (real, generated)]
        return {"reward_real": values[0], "reward_generated": values[1]}

    def adversarial_epoch(self) -> dict[str, float]:
        losses, values = [self._policy_step() for _ in range(self.config.g_steps)], {}
        for _ in range(self.config.d_steps):
            values = self.discriminator_step(self.config.d_epochs)
        return {"g_loss": sum(losses) / max(1, len(losses)), **values}

    def _policy_step(self) -> float:
        config = self.config
        places = torch.randint(len(self.data), (config.batch,), generator=self.draw, device=self.data.device)
        real = self.data[places]
        ids, logs = generator_sample(self.generator, real, config.samples, self.draw)
        with torch.no_grad():
            returns = dpgan_returns(*self.discriminator.reward(ids), config.gamma, config.clip)
        if config.baseline:
            mean = returns.mean(0)
            known = mean if self.baseline is None else self.baseline
            returns = returns - known
            self.baseline = _BASELINE_DECAY * known + (1 - _BASELINE_DECAY) * mean
        loss = self._step("policy", (-logs * returns).sum()) / config.batch
        if config.mle_weight:
            with torch.no_grad():
                word, _ = self.discriminator.reward(real)
                worth = word.clamp(max=config.clip if config.clip is not None else math.inf) / _MLE_SCALE
            likelihood = (-self.generator.word_log_probs(real) * worth).mean()
            self._step("mle", likelihood, config.mle_weight)
        return loss

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """What is known of the generator alone, and what `evaluate` says of its samples."""
        samples, logs = self.generator.sample(self.config.eval_samples, self.draw)
        parts = self.heldout.split(1024)
        total = sum(float(self.generator.word_log_probs(part).sum()) for part in parts)
        values = {
            "nll_gen": -total / self.heldout.numel(),
            "nll_div": -float(logs.mean()),
            "unique_share": len(samples.unique(dim=0)) / len(samples),
        }
        return values | (dict(self.evaluate(samples)) if self.evaluate else {})

    def save(self) -> None:
        if self.folder is None:
            return
        tensors = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        tensors |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= flat_optimizer(name, optimizer)
        tensors |= {"draw": self.draw.get_state()} | ({} if self.baseline is None else {"baseline": self.baseline})
        write_state(
            self.folder, tensors,
            {"settings": self._settings(), "phase": self.phase, "epoch": self.epoch, "steps": self.steps,
             "history": self.history.to_data()},
        )  # fmt: skip

    def _settings(self) -> dict[str, object]:
        """What a run must have in common with one that it goes on from."""
        own = hashlib.sha256(self.data.cpu().contiguous().numpy().tobytes()).hexdigest()
        return {**self.config.to_data(), "data": own}

    def resume(self) -> None:
        """Go on from the folder's state, if it holds one."""
        found = read_state(self.folder) if self.folder is not None else None
        if found is None:
            return
        tensors, state = found
        own = self._settings()
        if other := sorted(name for name, value in own.items() if state["settings"].get(name) != value):
            raise InputError(
                f"{self.folder}: its run has other settings ({', '.join(other)}); give those, or an empty folder to begin anew"
            )
        for prefix, model in (("generator.", self.generator), ("discriminator.", self.discriminator)):
            mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in model.state_dict().items()}:
                raise InputError(
                    f"{self.folder}: its {prefix[:-1]} has another form than the one given; build it as before"
                )
            model.load_state_dict(mine)
        for name, optimizer in self.optimizers.items():
            fill_optimizer_(name, optimizer, tensors)
        self.draw.set_state(tensors["draw"].cpu())
        if "baseline" in tensors:
            self.baseline = tensors["baseline"].to(self.data.device)
        self.phase, self.epoch, self.steps = state["phase"], state["epoch"], dict(state["steps"])
        self.history = DPGANHistory.from_data(state["history"])
