"""Vision transformers that are trained by filling in masked patches, of any depth and width (He et al., 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, NotFiniteError
from layerwright.models._vit_blocks import VitBlock, checked_heads, patches_of, sincos_positions, start_
from layerwright.nn.random_mask import RandomMask, keep_tokens, mask_of, random_mask, restore_tokens

__all__ = ["ImageClassifier", "ImageEncoder", "MaskedAutoencoder"]

CLS = 1
"""Tokens in front of the patches."""


class ImageEncoder(nn.Module):
    """Patches, fixed sine-cosine positions, a class token, `depth` blocks with norms before the parts, a norm.

    Blocks hold ``12 depth dim^2`` weights. Masked patches are left out before the first block: it sees visible ones alone.

    Args:
        image_size: side of the square images, a multiple of `patch`.
        patch: side of a patch.
        in_chans: channels of an image.
        dim, depth, heads: features of a token, blocks, heads of each; `heads` divides `dim`, which is a multiple of 4.
        eps: of the norms.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self, image_size: int, patch: int, in_chans: int, dim: int, depth: int, heads: int, eps: float = 1e-6
    ) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("patch", patch), ("in_chans", in_chans), ("depth", depth)):
            if value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if image_size % patch:
            raise InputError(f"image_size: got {image_size}, expected a multiple of the patch size {patch}")
        checked_heads(dim, heads)
        self.image_size, self.patch, self.in_chans, self.dim = image_size, patch, in_chans, dim
        self.side = image_size // patch
        self.patches = nn.Conv2d(in_chans, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(dim, self.side))
        self.blocks = nn.ModuleList(VitBlock(dim, heads, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps)
        start_(self, self.patches)
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return self.side * self.side

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Features ``(batch, 1 + visible, dim)`` of images ``(batch, in_chans, image_size, image_size)``, class token first.

        Args:
            images: finite.
            ids_keep: places of the visible patches ``(batch, visible)``; all of them without.

        Raises:
            InputError: images of another shape.
        """
        expected = (self.in_chans, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"images: got shape {tuple(images.shape)}, expected (batch, {', '.join(map(str, expected))})"
            )
        if ids_keep is not None:
            # Only visible patches are embedded: a masked pixel that is not finite cannot reach the encoder.
            visible = keep_tokens(patches_of(images, self.patch), ids_keep)
            x = nn.functional.linear(visible, self._flat_patches(), self.patches.bias)
            x = x + self.positions[CLS:].to(x.dtype)[ids_keep]
        else:
            x = self.patches(images).flatten(2).mT
            x = x + self.positions[CLS:].to(x.dtype)
        first = self.cls_token + self.positions[0].to(x.dtype)
        x = torch.cat([first.expand(len(x), 1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]

    def block_parameters(self) -> int:
        """Weights of all blocks without biases and norms: ``12 depth dim^2``."""
        return sum(parameter.numel() for parameter in self.blocks.parameters() if parameter.dim() == 2)

    def _flat_patches(self) -> Tensor:
        """The patch embedding as a matrix ``(dim, patch patch in_chans)`` in the order of `patches_of`."""
        return self.patches.weight.permute(0, 2, 3, 1).flatten(1)


class MaskedAutoencoder(nn.Module):
    """An `ImageEncoder` that sees a quarter of the patches, and a small decoder that fills in the pixels of the others.

    The loss is the mean squared error over masked patches alone, of pixels that are normalised within each patch.

    Source: He et al., 2021, arXiv 2111.06377; deeper and narrower encoders at equal parameters: Xue et al., 2022, arXiv
    2205.10505.

    Args:
        image_size, patch, in_chans, dim, depth, heads: of the encoder.
        decoder_dim, decoder_depth, decoder_heads: of the decoder, which sees all places.
        mask_ratio: share of the patches that is masked, inside (0, 1).
        norm_pix: normalise the target of each patch by its own mean and variance.
        eps: of the norms.
        seed: of the first weights; the global generator is left alone.

    Raises:
        InputError: a number outside its range, or a ratio that leaves no visible patch.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        in_chans: int,
        dim: int,
        depth: int,
        heads: int,
        decoder_dim: int,
        decoder_depth: int,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        *,
        decoder_heads: int = 4,
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if decoder_depth < 1:
            raise InputError(f"decoder_depth: got {decoder_depth}, expected at least 1")
        checked_heads(decoder_dim, decoder_heads, "decoder_heads")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = ImageEncoder(image_size, patch, in_chans, dim, depth, heads, eps)
            random_mask(self.encoder.tokens, mask_ratio)  # refuses a ratio that leaves nothing
            self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
            self.decoder_embed = nn.Linear(dim, decoder_dim)
            self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
            self.decoder_positions: Tensor
            self.register_buffer("decoder_positions", sincos_positions(decoder_dim, self.encoder.side))
            self.decoder = nn.ModuleList(VitBlock(decoder_dim, decoder_heads, eps=eps) for _ in range(decoder_depth))
            self.decoder_norm = nn.LayerNorm(decoder_dim, eps=eps)
            self.predict = nn.Linear(decoder_dim, patch * patch * in_chans)
            for part in (self.decoder_embed, self.decoder, self.predict):
                start_(part, self.encoder.patches)
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, images: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, fill in.

        Args:
            images: ``(batch, in_chans, image_size, image_size)``, finite.
            generator: of the masks.
            noise: ``(batch, n)`` in its place, see `random_mask`.

        Returns:
            The loss, predicted pixels ``(batch, n, patch patch in_chans)``, and the mask ``(batch, n)``, 1 where masked.

        Raises:
            InputError: images of another shape.
            NotFiniteError: a loss that is not finite.
        """
        batch = len(images)
        chosen = random_mask(
            self.encoder.tokens, self.mask_ratio, generator, batch=batch, noise=noise, device=images.device
        )
        predicted = self.decode(self.encoder(images, chosen.ids_keep), chosen.ids_restore)
        loss = self.loss(images, predicted, chosen.mask)
        return loss, predicted, chosen.mask

    def encode(self, images: Tensor, mask: Tensor | RandomMask | None = None) -> Tensor:
        """Features ``(batch, 1 + visible, dim)``, class token first; of the whole image without a mask.

        Args:
            images: ``(batch, in_chans, image_size, image_size)``.
            mask: ``(batch, n)``, 1 where masked, with equally many visible patches in each sample.

        Raises:
            InputError: images or mask of another shape, or unequal numbers of visible patches.
        """
        if mask is None:
            return self.encoder(images)  # type: ignore[no-any-return]
        chosen = mask if isinstance(mask, RandomMask) else mask_of(mask)
        if chosen.mask.shape != (len(images), self.encoder.tokens):
            raise InputError(
                f"mask: got shape {tuple(chosen.mask.shape)}, expected ({len(images)}, {self.encoder.tokens})"
            )
        return self.encoder(images, chosen.ids_keep)  # type: ignore[no-any-return]

    def decode(self, features: Tensor, ids_restore: Tensor) -> Tensor:
        """Pixels of all patches ``(batch, n, patch patch in_chans)`` from what the encoder gave for the visible ones."""
        x = self.decoder_embed(features)
        x = torch.cat([x[:, :CLS], restore_tokens(x[:, CLS:], self.mask_token, ids_restore)], 1)
        x = x + self.decoder_positions.to(x.dtype)
        for block in self.decoder:
            x = block(x)
        return self.predict(self.decoder_norm(x))[:, CLS:]  # type: ignore[no-any-return]

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted, ``(batch, n, patch patch in_chans)``: pixels, normalised within each patch."""
        pixels = patches_of(images, self.encoder.patch).float()
        if not self.norm_pix:
            return pixels
        return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()

    def loss(self, images: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over masked patches; what is at visible ones, in target or prediction, does not count.

        Raises:
            NotFiniteError: it is not finite.
        """
        errors = (predicted.float() - self.target(images)).square().mean(-1)
        loss = errors[mask.bool()].mean()
        if not bool(torch.isfinite(loss)):
            raise NotFiniteError("masked autoencoder: the loss is not finite; look for NaN in the images or weights")
        return loss


class ImageClassifier(nn.Module):
    """An `ImageEncoder`, the mean over its patches (or its class token), and a linear classifier.

    Args:
        encoder: used as it is, not copied.
        classes: at least 2.
        pool: ``mean`` over patches, or ``cls``.
        seed: of the classifier's weights.

    Raises:
        InputError: fewer than 2 classes, or another pool.
    """

    def __init__(self, encoder: ImageEncoder, classes: int, pool: str = "mean", *, seed: int = 0) -> None:
        super().__init__()
        if classes < 2:
            raise InputError(f"classes: got {classes}, expected at least 2")
        if pool not in ("mean", "cls"):
            raise InputError(f"pool: got {pool!r}, expected mean or cls")
        self.encoder, self.pool = encoder, pool
        self.head = nn.Linear(encoder.dim, classes)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(std=0.02, generator=draw)
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        return self.head(self.features(images))  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> Tensor:
        """Pooled features ``(batch, dim)``."""
        states: Tensor = self.encoder(images)
        return states[:, 0] if self.pool == "cls" else states[:, CLS:].mean(1)
