"""Let blocks run twice on the prompt, with a gate for each token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from layerwright.core.class_swap import swapped
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers, structure_copy
from layerwright.nn.attached import attached, detach_
from layerwright.nn.gates import TokenMixer
from layerwright.nn.traversed import Chunked, Traversal, TraversedTokens, release_
from layerwright.treat._chosen_blocks import chosen_blocks

__all__ = ["TraversalHandle", "find_traversal", "traverse"]


class TraversalHandle:
    """The gates of a traversed model.

    Args:
        model: traversed.
        blocks: paths of the blocks that run twice.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.model, self.blocks = model, tuple(blocks)
        tokens = self.traversals[0].tokens
        if not tokens.linked:
            tokens = TraversedTokens(linked=True)
            for traversal in self.traversals:
                traversal.tokens = tokens
        self.tokens = tokens

    @property
    def traversals(self) -> tuple[Traversal, ...]:
        """What stands beside each block, in order."""
        found = (attached(self.model.get_submodule(path), Traversal.child) for path in self.blocks)
        return tuple(traversal for traversal in found if isinstance(traversal, Traversal))

    @property
    def mixers(self) -> nn.ModuleList:
        """The gate of each block; one and the same where blocks share it."""
        return nn.ModuleList([traversal.mixer for traversal in self.traversals])

    def gates(self) -> list[Tensor | None]:
        """Gates ``(batch, tokens)`` of the last call, by block; None where the block ran once."""
        return [traversal.last for traversal in self.traversals]

    def set_traverse_mask(self, mask: Tensor | None) -> None:
        """Tokens that keep to the first pass (0) or are blended (1), ``(batch, tokens)``, for the calls that follow.

        Answers in training can so be treated as they are when they are generated. None takes the mask away.
        """
        self.tokens.mask = mask

    def unshare(self) -> None:
        """Give each block a gate of its own, of the present values, in place."""
        for traversal in self.traversals:
            if traversal.shared:
                bias = traversal.mixer.bias
                mixer = TokenMixer(traversal.mixer.dim).to(traversal.mixer.weight)
                mixer.load_state_dict(traversal.mixer.state_dict())
                traversal.mixer, traversal.shared = mixer, False
                assert bias is not None
                mixer.requires_grad_(bias.requires_grad)

    def remove(self) -> nn.Module:
        """Let every block run once again, in place. Returns the model."""
        for path in self.blocks:
            owner = self.model.get_submodule(path)
            release_(owner)
            detach_(owner, Traversal.child)
        return self.model


def traverse(
    model: nn.Module,
    blocks: str | Sequence[str] | Sequence[int] = "all",
    *,
    init_gate: float = 0.5,
    share_gate: bool = False,
    prompt_only: bool = True,
    chunked: Chunked | None = None,
    copy: bool = True,
) -> TraversalHandle:
    """Let blocks run twice where the model reads several tokens (Lee et al., 2024, TroL, arXiv 2406.12246).

    See `Traversal` for the mathematics. The prompt passes each block twice, generated tokens pass it once, and the
    cache holds what the first pass made: a prompt read at once is not what the same tokens give one by one. In
    training all tokens pass twice. Costs ``d + 1`` parameters for each block.

    Args:
        model: any model of blocks whose output has the shape of their input.
        blocks: ``all``, or paths or indices.
        init_gate: the gate of all tokens at the start, between 0 and 1; near 0 the model computes what it did.
        share_gate: one gate for all blocks, as in the released code.
        prompt_only, chunked: see `Traversal`.
        copy: leave `model` alone; the result shares its tensors. False changes it.

    Returns:
        The handle; its ``model`` is what is called.

    Raises:
        TypeError: the model has no blocks (or, when it runs, one that changes the shape).
        InputError: `init_gate` outside its range, an unknown block, or a model that is traversed already.
    """
    chosen = chosen_blocks(model, None if blocks == "all" else blocks)
    TokenMixer(1, init_gate)  # refuses what is no gate
    for path in chosen:
        if swapped(model.get_submodule(path)):
            raise InputError(f"{path} is changed already: the model is traversed, or its tokens are routed")
    widths = dict.fromkeys(chosen, 0)
    for ref in list_layers(model):
        for path in chosen:
            if ref.role in ("down", "o") and ref.path.startswith(path + "."):
                widths[path] = ref.shape[0]
    missing = [path for path, width in widths.items() if not width]
    if missing:
        raise TypeError(f"blocks: found no projection back to the hidden states in {missing[0]}")
    result = structure_copy(model) if copy else model
    common: TokenMixer | None = None
    for path in chosen:
        owner = result.get_submodule(path)
        like = next(parameter for parameter in owner.parameters() if parameter.is_floating_point())
        mixer = common if common is not None else TokenMixer(widths[path], init_gate)
        common = mixer if share_gate else None
        traversal = Traversal(mixer, prompt_only, chunked).to(device=like.device, dtype=like.dtype)
        traversal.shared = share_gate
        traversal.attach_(owner).train(owner.training)
    return TraversalHandle(result, chosen)


def find_traversal(model: nn.Module) -> TraversalHandle | None:
    """The handle of a model that is traversed (a loaded or copied one), None if it is not."""
    paths = [name for name, module in model.named_modules() if isinstance(module, Traversal)]
    return TraversalHandle(model, [path.rpartition(".")[0] for path in paths]) if paths else None
