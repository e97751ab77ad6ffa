"""The controller: an encoder of words, an actor that widens and one that inserts, trained by REINFORCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwright.allocate.controller.space import Space, encode
from layerwright.core.errors import InputError

__all__ = ["Decisions", "MetaController"]

Specs = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Decisions:
    """What one actor decided for a batch of networks.

    Attributes:
        kind: ``wider`` or ``deeper``.
        specs: the words it saw.
        choices: ``(batch, steps)`` of 0 and 1, or ``(batch, decisions)`` of indices.
        mask: which of them were free: the others had one way only, or are of no account ``(same shape)``, bool.
    """

    kind: str
    specs: tuple[tuple[str, ...], ...]
    choices: Tensor
    mask: Tensor


class MetaController(nn.Module):
    """Reads a network's words with a bidirectional LSTM and decides how it grows.

    The wider actor gives every position the probability ``sigmoid(w h_t + b)`` and draws all at once. The deeper actor,
    an LSTM that starts from the encoder's last states, draws a block, a layer in it and, for convolutions, a kernel
    size; the last draw is the next input. What cannot be done has probability 0, and the others are renormalised.

    Args:
        space: words and limits of the networks.
        steps: most words of a network.
        embed: size of the embeddings, uniform in +-sqrt(3) at first (variance 1).
        hidden: units of the encoder in each direction.
        learning_rate: of Adam.
        entropy: weight of the mean entropy of the free decisions.
        seed: of the first weights.

    Source: Cai, Chen, Zhang, Yu and Wang, Efficient Architecture Search by Network Transformation, AAAI 2018.
    """

    def __init__(
        self,
        space: Space,
        steps: int = 50,
        embed: int = 16,
        hidden: int = 50,
        learning_rate: float = 2e-3,
        entropy: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(steps, embed, hidden) < 1 or not learning_rate > 0 or entropy < 0:
            raise InputError("steps, embed, hidden and learning_rate must be above 0, entropy at least 0")
        self.space = space
        self.steps = steps
        self.entropy = entropy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = _embedding(len(space.words) + 1, embed)
            self.encoder = nn.LSTM(embed, hidden, batch_first=True, bidirectional=True)
            self.wider = nn.Linear(2 * hidden, 1)
            self.decoder = nn.LSTMCell(embed, 2 * hidden)
            sizes = space.decisions
            self.previous = nn.ModuleList(_embedding(size, embed) for size in (1, *sizes[:-1]))
            self.heads = nn.ModuleList(nn.Linear(2 * hidden, size) for size in sizes)
            self._start_(hidden)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        self.episode: list[Decisions] = []

    def _start_(self, hidden: int) -> None:
        """Matrices by Glorot's rule, biases 0, and 1 for what the LSTMs keep, so that they remember at first."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "embedding" not in name and "previous" not in name:
                nn.init.xavier_uniform_(parameter)
            elif parameter.dim() == 1:
                nn.init.zeros_(parameter)
        with torch.no_grad():
            for suffix in ("", "_reverse"):
                getattr(self.encoder, f"bias_ih_l0{suffix}")[hidden : 2 * hidden] = 1
            self.decoder.bias_ih[2 * hidden : 4 * hidden] = 1

    def encode(self, specs: Specs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """States of every position ``(batch, steps, 2 hidden)``, 0 behind the end, and the last states of both ways.

        Raises:
            InputError: an unknown word, or too many.
        """
        numbers = torch.tensor([encode(self.space.words, spec, self.steps) for spec in specs])
        lengths = torch.tensor([len(spec) for spec in specs])
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(numbers), lengths, batch_first=True, enforce_sorted=False
        )
        output, (h, c) = self.encoder(packed)
        states, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True, total_length=self.steps)
        return states, (torch.cat([h[0], h[1]], 1), torch.cat([c[0], c[1]], 1))

    def wider_probabilities(self, specs: Specs) -> tuple[Tensor, Tensor]:
        """``(probabilities, mask)``, each ``(batch, steps)``: of widening every position; 0 where it cannot be."""
        states, _ = self.encode(specs)
        mask = torch.zeros(len(specs), self.steps, dtype=torch.bool)
        for row, spec in enumerate(specs):
            mask[row, : len(spec)] = torch.tensor(self.space.growable(spec))
        return torch.sigmoid(self.wider(states)[..., 0]) * mask, mask

    def deeper_probabilities(
        self, specs: Specs, choices: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Probabilities of each step, ``(batch, its choices)``, of an insertion.

        Args:
            specs: the networks.
            choices: ``(batch, decisions)`` that were made, each the next step's input; None draws them.
            generator: of the draw.

        Returns:
            The probabilities, the choices, and the mask ``(batch, decisions)`` of those that count: no kernel size
            behind a fully connected layer, nothing at all where a network cannot grow.
        """
        _, (h, c) = self.encode(specs)
        counts = torch.tensor([self._counts(spec) for spec in specs])
        possible = counts.any(1)
        last = torch.zeros(len(specs), dtype=torch.long)
        made: list[Tensor] = []
        found: list[Tensor] = []
        for step, (embedding, head) in enumerate(zip(self.previous, self.heads, strict=True)):
            h, c = self.decoder(embedding(last), (h, c))
            logits = head(h)
            allowed = torch.ones_like(logits, dtype=torch.bool)
            if step == 0:
                allowed = counts > 0
            elif step == 1:
                allowed = torch.arange(logits.shape[1]) < counts.gather(1, last[:, None])
            # Where nothing is possible the draw has no effect, but must have a way.
            allowed = allowed | (~possible[:, None] & (torch.arange(logits.shape[1]) == 0))
            probability = logits.masked_fill(~allowed, -torch.inf).softmax(1)
            last = _draw(probability, generator) if choices is None else choices[:, step]
            found.append(probability)
            made.append(last)
        drawn = torch.stack(made, 1)
        mask = possible[:, None].repeat(1, len(made))
        if len(made) > 2:
            for row, spec in enumerate(specs):
                position = self.position(spec, drawn[row])
                mask[row, 2] &= position is not None and self.space.takes_kernel(spec[position])
        return found, drawn, mask

    def _counts(self, spec: Sequence[str]) -> list[int]:
        """Layers of each block behind which one can be inserted; none where no more words are possible."""
        blocks, layers = self.space.decisions[:2]
        counts = [min(len(block), layers) for block in self.space.blocks(spec)][:blocks]
        if len(spec) >= self.steps:
            counts = [0]
        return counts + [0] * (blocks - len(counts))

    def position(self, spec: Sequence[str], choice: Tensor) -> int | None:
        """The position in `spec` of the layer that a choice ``(decisions,)`` names; None where nothing can be inserted."""
        block, layer = int(choice[0]), int(choice[1])
        if layer >= self._counts(spec)[block]:
            return None
        return self.space.blocks(spec)[block][layer]

    @torch.no_grad()
    def act_wider(self, specs: Specs, generator: torch.Generator | None = None) -> Decisions:
        """Draw for every layer of every network whether it gets wider; remembered for `update`."""
        probability, mask = self.wider_probabilities(specs)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn = torch.rand(probability.shape, generator=generator) < probability
        return self._remember("wider", specs, drawn.long(), mask)

    @torch.no_grad()
    def act_deeper(self, specs: Specs, generator: torch.Generator | None = None) -> Decisions:
        """Draw for every network where a layer is inserted and how large its kernel is; remembered for `update`."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        _, drawn, mask = self.deeper_probabilities(specs, generator=generator)
        return self._remember("deeper", specs, drawn, mask)

    def _remember(self, kind: str, specs: Specs, choices: Tensor, mask: Tensor) -> Decisions:
        made = Decisions(kind, tuple(tuple(spec) for spec in specs), choices, mask)
        self.episode.append(made)
        return made

    def log_probability(self, made: Decisions) -> tuple[Tensor, Tensor]:
        """``(log probabilities (batch,), mean entropy of the free decisions)`` of what was decided, with gradients."""
        if made.kind == "wider":
            probability, mask = self.wider_probabilities(made.specs)
            # Where the mask is off the value is replaced before the logarithm, so that its gradient is 0 and not NaN.
            safe = probability.masked_fill(~mask, 0.5)
            chosen = torch.where(made.choices.bool(), safe, 1 - safe)
            logs = (chosen.log() * mask).sum(1)
            each = -(safe * safe.log() + (1 - safe) * (1 - safe).log()) * mask
            return logs, (each.sum(1) / mask.sum(1).clamp(min=1)).mean()
        found, _, mask = self.deeper_probabilities(made.specs, made.choices)
        logs = torch.zeros(len(made.specs))
        entropies = []
        for step, probability in enumerate(found):
            own = probability.gather(1, made.choices[:, step : step + 1])[:, 0]
            logs = logs + torch.where(mask[:, step], own, 1.0).log()
            entropies.append(-(probability * (probability + 1e-10).log()).sum(1))
        return logs, torch.stack(entropies).mean()

    def objective(self, advantages: Sequence[float]) -> Tensor:
        """``sum log p(decision) advantage / batch + entropy``: what a step of `update` raises.

        Raises:
            InputError: no decision was made, or there is not one advantage for each network.
        """
        if not self.episode:
            raise InputError("nothing was decided since the last update: act first")
        size = len(self.episode[0].specs)
        if len(advantages) != size or any(len(made.specs) != size for made in self.episode):
            raise InputError(f"advantages: got {len(advantages)}, expected one for each of the {size} networks")
        gain = torch.tensor(advantages, dtype=torch.float32) / size
        total = torch.zeros(())
        entropy = torch.zeros(())
        for made in self.episode:
            logs, own = self.log_probability(made)
            total = total + (logs * gain).sum()
            entropy = entropy + own / len(self.episode)
        return total + self.entropy * entropy

    def update(self, advantages: Sequence[float]) -> float:
        """One step of Adam on the decisions since the last one, which are forgotten; the objective before it.

        Args:
            advantages: reward less baseline of each network.
        """
        objective = self.objective(advantages)
        self.optimizer.zero_grad(set_to_none=True)
        (-objective).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.episode.clear()
        return float(objective.detach())


def _embedding(rows: int, size: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, size)
    nn.init.uniform_(embedding.weight, -(3**0.5), 3**0.5)
    return embedding


def _draw(probability: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(probability.detach(), 1, generator=generator)[:, 0]
