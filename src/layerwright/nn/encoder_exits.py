"""An encoder that classifies after each of its blocks, and stops where it is sure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.blocks import Blocks, find_blocks
from layerwright.core.calibration import logits_of
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError
from layerwright.nn.attached import attached
from layerwright.nn.exit_head import ExitHead, prediction_entropy
from layerwright.nn.scaled_gradient import scale_gradient

__all__ = ["ExitOutput", "ExitPrediction", "MultiExit", "encoder_blocks"]

Hook = Callable[[int, Tensor], Tensor]
"""``hook(number, states)``: what block `number` (0-based) hands on."""


class ExitPrediction(NamedTuple):
    """What `MultiExit.predict` found.

    Attributes:
        labels: predicted classes ``(batch,)``.
        exits: number of blocks that ran for each sample ``(batch,)``, from 1.
    """

    labels: Tensor
    exits: Tensor


@dataclass
class ExitOutput:
    """What all exits give.

    Attributes:
        exit_logits: logits ``(batch, classes)`` of each exit; the last are the model's own.
        hidden_states: ``(batch, tokens, hidden)``: what goes into the first block, then what each block gives.
        loss: sum of the exits' cross-entropies; None without labels.
    """

    exit_logits: list[Tensor]
    hidden_states: list[Tensor]
    loss: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Logits of the last exit."""
        return self.exit_logits[-1]


class _Stopped(Exception):  # noqa: N818 - a signal, not an error
    """Every sample has left."""


class MultiExit(nn.Module):
    """A classifier with an exit after each of several blocks (Shen et al., 2022, COST-EFF, arXiv 2210.15523).

    The exits are the `ExitHead` modules beside the blocks of `model`, and the model's own classifier. In training the
    gradients of the exits are averaged, not summed: with ``n_j`` exits at or above block ``j``, the block's output goes
    through ``R(.; 1 / n_j)``, is read by its exit, and goes on through ``R(.; n_{j+1})``, where ``R(.; w)`` is
    the identity with its gradient times ``w``. So block ``j`` receives ``1 / n_j`` times the sum over the exits above.

    Args:
        model: a classifier with one stack of encoder blocks; kept as `model`. Without heads the last exit is the only one.

    Raises:
        TypeError: the model is no such classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.block_paths = encoder_blocks(model).names
        self.model = model
        depth = len(self.block_paths)
        self.positions = tuple(
            number for number in range(1, depth + 1) if number == depth or self.head(number) is not None
        )
        heads = [head for number in self.positions if (head := self.head(number)) is not None]
        self.equalize = all(head.equalize for head in heads)
        counts = [sum(position > number for position in self.positions) for number in range(depth)]
        self._shares = [(1 / counts[j], counts[j + 1] if j + 1 < depth else 1) for j in range(depth)]

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.block_paths)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks, in order."""
        return tuple(self.model.get_submodule(path) for path in self.block_paths)

    def head(self, position: int) -> ExitHead | None:
        """The head after block number `position` (from 1); None where there is none, as after the last block."""
        if position == self.depth:
            return None
        head = attached(self.model.get_submodule(self.block_paths[position - 1]), ExitHead.child)
        return head if isinstance(head, ExitHead) else None

    def forward(self, x: Tensor | None = None, /, *, labels: Tensor | None = None, **inputs: Any) -> ExitOutput:
        """Logits of every exit and the states between the blocks, from one run.

        Args:
            x: the model's main input (``input_ids`` or ``pixel_values``), unless it is among the `inputs`.
            inputs: of the model's own by name, such as ``attention_mask``.
            labels: classes ``(batch,)``; with them the result has a loss.

        Raises:
            InputError: gradient checkpointing is on, under which the blocks would run again without their exits.
            TypeError: the model gives no logits ``(batch, classes)``.
        """
        if self.training and any(getattr(block, "gradient_checkpointing", False) for block in self.blocks):
            raise InputError("gradient checkpointing: exits need each block to run once; switch it off")
        if x is not None:
            inputs = self.inputs_of(x)[0] | inputs
        states: list[Tensor] = []

        def see(number: int, x: Tensor) -> Tensor:
            own, onward = self._shares[number] if self.equalize else (1, 1)
            x = scale_gradient(x, own)
            states.append(x)
            return scale_gradient(x, onward)

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
            states.append(first_tensor((*args, *kwargs.values())))

        handle = self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with _after_blocks(self.blocks, see):
                output = self.model(**inputs)
        finally:
            handle.remove()
        if len(states) != self.depth + 1:
            raise TypeError(
                f"model: {len(states) - 1} runs of {self.depth} blocks; exits need blocks that run once each"
            )
        logits = self._exit_logits(states, inputs.get("attention_mask"))
        logits.append(_class_logits(output))
        loss = None if labels is None else sum(F.cross_entropy(own.float(), labels) for own in logits)
        return ExitOutput(logits, states, loss if isinstance(loss, Tensor) else None)

    def _exit_logits(self, states: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        heads = ((position, self.head(position)) for position in self.positions[:-1])
        return [head(states[position], mask) for position, head in heads if head is not None]

    def inputs_of(self, batch: Any) -> tuple[dict[str, Any], Tensor | None]:
        """Inputs by name, and labels, of a mapping, a tensor, or ``(inputs, labels)``.

        Raises:
            TypeError: another kind of batch.
        """
        if isinstance(batch, Mapping):
            return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
        name = getattr(self.model, "main_input_name", "input_ids")
        if isinstance(batch, Tensor):
            return {name: batch}, None
        if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
            return {name: batch[0]}, batch[1]
        raise TypeError(f"batch: got {type(batch).__name__}, expected a mapping, a tensor or (inputs, labels)")

    def check_threshold(self, threshold: float) -> float:
        """`threshold` if it can decide over exits.

        Raises:
            InputError: it is negative or no number, or the model's logits are no classes that exclude each other.
        """
        if not threshold >= 0:
            raise InputError(f"threshold: got {threshold}, expected 0 nats or more (0 never exits early)")
        problem = getattr(self.config, "problem_type", None)
        if getattr(self.config, "num_labels", 2) < 2 or problem in ("regression", "multi_label_classification"):
            raise InputError(
                f"threshold: an entropy needs two classes or more that exclude each other; this model has "
                f"{getattr(self.config, 'num_labels', 1)} output(s), problem type {problem or 'regression'}"
            )
        return float(threshold)

    @torch.no_grad()
    def predict(self, x: Any, threshold: float) -> ExitPrediction:
        """Classes, each sample leaving at the first exit whose entropy is below `threshold`; nothing above it runs for it.

        Samples that have left are taken out of the batch, so that later blocks work on the others alone. In evaluation
        mode a sample's result does not depend on the others in its batch, up to rounding.

        Args:
            x: a mapping of inputs, or the input itself ``(batch, ...)``; labels are ignored.
            threshold: in nats: 0 always runs all blocks, infinity stops at the first exit.

        Raises:
            InputError: a threshold that cannot decide (see `check_threshold`).
            TypeError: the model gives no logits ``(batch, classes)``.
        """
        threshold = self.check_threshold(threshold)
        inputs = self.inputs_of(x)[0]
        run = _Run(self, threshold, inputs)
        try:
            with _before_blocks(self.blocks, run.compact), _after_blocks(self.blocks, run.leave):
                output = self.model(**inputs)
        except _Stopped:
            return ExitPrediction(run.labels, run.exits)
        run.labels[run.alive] = _class_logits(output).argmax(-1)[run.alive]
        return ExitPrediction(run.labels, run.exits)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"exits after {', '.join(map(str, self.positions))} of {self.depth} blocks, equalize={self.equalize}"


class _Run:
    """One batch on its way up: who is left, and what those that left were found to be."""

    def __init__(self, owner: MultiExit, threshold: float, inputs: Mapping[str, Any]) -> None:
        self.owner, self.threshold = owner, threshold
        first = first_tensor(inputs)
        self.rows = len(first)
        self.mask = inputs.get("attention_mask")
        self.alive = torch.arange(self.rows, device=first.device)
        self.labels = torch.zeros_like(self.alive)
        self.exits = torch.full_like(self.alive, owner.depth)
        self.handed: Tensor | None = None
        self.whole: Tensor | None = None

    def compact(self, value: Any) -> Any:
        """An argument of a block, for those that are left; the states are so already."""
        if isinstance(value, tuple | list):
            return type(value)(self.compact(item) for item in value)
        if not isinstance(value, Tensor) or value is self.handed or len(self.alive) == self.rows:
            return value
        # A mask, or what else has a row for each sample; a table of relative positions is a float matrix.
        along = value.dim() >= 3 or (value.dim() == 2 and not value.is_floating_point())
        return value[self.alive] if along and len(value) == self.rows else value

    def leave(self, number: int, x: Tensor) -> Tensor:
        """Let those go that are sure after block `number`; behind the last block all stand in their places again."""
        head = self.owner.head(number + 1)
        if head is not None:
            logits = head(x, None if self.mask is None else self.mask[self.alive])
            sure = prediction_entropy(logits) < self.threshold
            gone = self.alive[sure]
            if len(gone):
                self.labels[gone], self.exits[gone] = logits[sure].argmax(-1), number + 1
                self.alive = self.alive[~sure]
                if not len(self.alive):
                    raise _Stopped
                self.whole = x.clone() if self.whole is None else self.whole
                x = x[~sure]
        if number + 1 == self.owner.depth and self.whole is not None:
            self.whole[self.alive] = x
            x = self.whole
        self.handed = x
        return x


def encoder_blocks(model: nn.Module) -> Blocks:
    """The stack of blocks of an encoder classifier.

    Raises:
        TypeError: the model is no classifier with a configuration, has not exactly one stack of encoder blocks, or runs
            a block several times.
    """
    config = getattr(model, "config", None)
    name = type(model).__name__
    if not isinstance(model, nn.Module) or config is None or not hasattr(model, "num_labels"):
        raise TypeError(f"model: got {name}, expected a transformers model for sequence or image classification")
    try:
        stacks = find_blocks(model)
    except InputError as error:
        raise TypeError(f"model: exits need its hidden states, {error}") from error
    if len(stacks) != 1 or stacks[0].role != "encoder":
        found = ", ".join(f"{stack.path} ({stack.role}, {len(stack)})" for stack in stacks)
        raise TypeError(f"model: {name} has {found}; exits need one stack of encoder blocks")
    if getattr(config, "num_hidden_layers", len(stacks[0])) != len(stacks[0]):
        raise TypeError(
            f"model: {name} runs {config.num_hidden_layers} layers with {len(stacks[0])} blocks; exits need one each"
        )
    return stacks[0]


def _class_logits(output: Any) -> Tensor:
    logits = logits_of(output)
    if logits.dim() != 2:
        raise TypeError(f"model: its logits have shape {tuple(logits.shape)}, exits need (batch, classes)")
    return logits


@contextmanager
def _after_blocks(blocks: Sequence[nn.Module], see: Hook) -> Iterator[None]:
    """Context: what each block hands on is what ``see(number, states)`` makes of it."""

    def after(number: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            x = see(number, first_tensor(output))
            return x if isinstance(output, Tensor) else type(output)((x, *output[1:]))

        return hook

    handles = [block.register_forward_hook(after(number)) for number, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _before_blocks(blocks: Sequence[nn.Module], change: Callable[[Any], Any]) -> Iterator[None]:
    """Context: each block but the first gets ``change(argument)`` for each of its arguments."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(change(value) for value in args), {key: change(value) for key, value in kwargs.items()}

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks[1:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
