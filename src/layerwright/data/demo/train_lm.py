"""Train ``demo:lm`` from nothing: ``python -m layerwright.data.demo.train_lm``.

A byte-level Llama (RMSNorm, SwiGLU, RoPE, grouped-query attention, 8 blocks, 2 M parameters) on the text of Python's
standard library. About an hour on two cores; a killed run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from layerwright.data.stdlib import stdlib_text

END_OF_TEXT, PADDING, VOCABULARY = 256, 257, 272


def byte_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` whose token ids 0..255 are the bytes themselves; 256 ends a text, 257 pads."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in symbols):
        symbols[byte] = chr(256 + offset)
    vocabulary = {symbol: byte for byte, symbol in symbols.items()}
    vocabulary |= {"<|endoftext|>": END_OF_TEXT, "<|pad|>": PADDING}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|pad|>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=1024
    )


def byte_stream(texts: list[str]) -> torch.Tensor:
    """Concatenate documents into one ``(bytes,)`` int64 stream, each ended by the end-of-text id."""
    parts: list[torch.Tensor] = []
    for text in texts:
        parts += [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long(), torch.tensor([END_OF_TEXT])]
    return torch.cat(parts)


def windows(stream: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """`count` windows of `length` tokens, evenly spread over `stream`: ``(count, length)``."""
    starts = torch.linspace(0, len(stream) - length - 1, count).long()
    return stream[starts[:, None] + torch.arange(length)]


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, batch: torch.Tensor) -> float:
    """Mean next-byte loss in nats over the windows ``(count, length)``."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() for part in batch.split(16)]
    model.train()
    return sum(losses) / len(losses)


def save_state(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, step: int
) -> None:
    """Write everything a later run needs to go on, as safetensors, under a temporary name first."""
    from safetensors.torch import save_file

    tensors = {"step": torch.tensor(step), "generator": generator.get_state()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """Take up what `save_state` wrote; returns the number of steps done."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    generator.set_state(tensors["generator"])
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return int(tensors["step"])


def train(out: Path, steps: int, batch: int, length: int, peak_lr: float, seed: int, threads: int | None) -> float:
    """Train, save to `out` in the Hugging Face layout and return the held-out loss in nats per byte."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=PADDING,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.div_(math.sqrt(2 * config.num_hidden_layers))
    stream, held = byte_stream(stdlib_text("train")), windows(byte_stream(stdlib_text("heldout")), length, 64)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    state = out.with_name(out.name + ".state.safetensors")
    start = 0
    if state.exists():
        start = load_state(state, model, optimizer, generator)
    begun = time.perf_counter()
    for step in range(start, steps):
        rate = peak_lr * min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - length - 1, (batch,), generator=generator)
        ids = stream[starts[:, None] + torch.arange(length)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begun
            print(
                f"step {step + 1}/{steps}  train {loss.item():.4f}  held out {heldout_loss(model, held):.4f} nats/byte"
                f"  {seconds:.0f} s",
                flush=True,
            )
            save_state(state, model, optimizer, generator, step + 1)
    model = model.to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    state.unlink(missing_ok=True)
    return heldout_loss(model.float(), held)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "lm")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--peak-lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    a = parser.parse_args()
    loss = train(a.out, a.steps, a.batch, a.length, a.peak_lr, a.seed, a.threads)
    print(f"held-out loss {loss:.4f} nats/byte = {loss / math.log(2):.4f} bits/byte; saved to {a.out}")


if __name__ == "__main__":
    main()
