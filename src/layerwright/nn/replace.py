"""Put treated layers into a model, list them, and build them again from plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, from_matrices, get_parameter
from layerwright.core.registry import Registry
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import Attachment
from layerwright.nn.attention_products import AttentionProducts
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.experts import ExpertStack, LowRankStack, PackedStack, SparseStack, replace_parameter_
from layerwright.nn.low_rank import LowRankConv, LowRankLinear
from layerwright.nn.mixed_rows import MixedRowLinear
from layerwright.nn.quantized import QuantConv, QuantEmbedding, QuantLinear
from layerwright.nn.sparse import SparseConv, SparseLinear
from layerwright.nn.stored import Stored
from layerwright.nn.tied import Tied, TiedEmbedding, TiedLinear
from layerwright.nn.ties import sharing_names, untie_
from layerwright.nn.treated import owned

__all__ = ["MODULES", "module_from_spec", "rebuild_", "replace_", "structure_of"]

MODULES: Registry[type[Any]] = Registry("module")
"""Classes with ``empty(spec)`` by the ``type`` of their `spec`."""

for _name, _cls in {
    "low_rank_conv": LowRankConv,
    "low_rank_linear": LowRankLinear,
    "low_rank_stack": LowRankStack,
    "packed_stack": PackedStack,
    "quant_conv": QuantConv,
    "quant_embedding": QuantEmbedding,
    "quant_linear": QuantLinear,
    "sparse_conv": SparseConv,
    "sparse_linear": SparseLinear,
    "sparse_stack": SparseStack,
    "tied_embedding": TiedEmbedding,
    "tied_linear": TiedLinear,
}.items():
    MODULES.add(_name, _cls)
MODULES.add("lora_linear", "layerwright.nn.lora:LoraLinear")
MODULES.add("lora_mixture", "layerwright.nn.lora_mixture:LoRAMixture")
MODULES.add("input_quantizer", InputQuantizer)
MODULES.add("mixed_row_linear", MixedRowLinear)
MODULES.add("w4a8_linear", "layerwright.nn.w4a8:W4A8Linear")
MODULES.add("adaptive", "layerwright.nn.adaptive:AdaptiveLayer")
MODULES.add("attention_products", AttentionProducts)
MODULES.add("factorized_conv", "layerwright.nn.factorized:FactorizedConv")
MODULES.add("resized_linear", "layerwright.nn.resized:ResizedLinear")
MODULES.add("exit_head", "layerwright.nn.exit_head:ExitHead")
MODULES.add("factorized_embedding", "layerwright.nn.factorized_embedding:FactorizedEmbedding")
MODULES.add("pruned_heads", "layerwright.nn.pruned_heads:PrunedHeads")
MODULES.add("ngram_hash_embedding", "layerwright.nn.ngram_embedding:NGramHashEmbedding")
MODULES.add("wide_attention", "layerwright.nn.wide_attention:WideAttention")
MODULES.add("one_hot_embedding", "layerwright.nn.one_hot:OneHotEmbedding")
MODULES.add("one_hot_head", "layerwright.nn.one_hot:OneHotHead")
MODULES.add("memory_attention", "layerwright.nn.memory_attention:MemoryAttention")
MODULES.add("norm_scale", "layerwright.nn.norm_scale:NormScale")
MODULES.add("persistent_attention", "layerwright.nn.persistent_attention:PersistentAttention")
MODULES.add("peer", "layerwright.nn.peer:PEER")
MODULES.add("token_routing", "layerwright.nn.routed:TokenRouting")
MODULES.add("traversal", "layerwright.nn.traversed:Traversal")
MODULES.add("cache_budget", "layerwright.nn.kv.attach:CacheBudget")
MODULES.add("key_value_rounding", "layerwright.nn.rounded_cache:KeyValueRounding")


_CONVS: dict[str, Any] = {"low_rank": LowRankConv, "sparse": SparseConv, "quantized": QuantConv}
_LINEARS: dict[str, Any] = {"low_rank": LowRankLinear, "sparse": SparseLinear, "quantized": QuantLinear}


def replace_(model: nn.Module, ref: LayerRef, stored: Stored) -> None:
    """Put the treated weight `stored` in place of the layer `ref`, wherever `model` uses that layer.

    The layer keeps its bias, dtype, device and training flag. A plain dense weight becomes a new parameter of the
    layer that is there. No tensor of the old layer is written to, so that a model that shares it stays as it was.

    Tied weights: layers that use the weight of `ref` go on using it in its new form. A `ref` that itself only uses
    another layer's weight (`ref.tied`) is untied: that layer stays as it is.

    Raises:
        InputError: the layer's own forward is not that of a plain linear layer, convolution or embedding, the
            treatment does not exist for that kind of layer, or the shapes differ.
    """
    if stored.shape != (ref.count, *ref.shape):
        raise InputError(f"{ref.path}: got a weight of shape {stored.shape}, expected {(ref.count, *ref.shape)}")
    dense = stored.dense is not None and stored.mask is None
    sharing = [] if ref.tied or ref.count > 1 else sharing_names(model, ref.parameter)
    if dense:
        _replace_parameter(model, ref, stored, sharing)
        if ref.tied:
            untie_(model, [ref.parameter])
    elif ref.layout in ("experts", "experts_transposed"):
        _replace_experts(model, ref, stored)
    else:
        old = model.get_submodule(ref.path)
        if old is model:
            raise InputError("the model is itself this layer: wrap it (nn.Sequential) so that it can be replaced")
        parameter = get_parameter(model, ref.parameter)
        new = _build(old, ref, stored, parameter.dtype).to(parameter.device)
        followers = [(model.get_submodule(name.rpartition(".")[0]), name) for name in sharing]
        tied = [(module, _follower(module, ref.path, name)) for module, name in followers]
        _swap(model, old, new.train(old.training))
        for module, follower in tied:
            follower.link(new)
            _swap(model, module, follower.train(module.training))
        untie_(model, [ref.parameter, *sharing])


def module_from_spec(spec: Mapping[str, Any]) -> nn.Module:
    """An empty module of the form that `spec` describes (``module.spec()`` of a treated layer).

    Raises:
        InputError: an unknown type, or settings that are missing or wrong.
    """
    if "type" not in spec:
        raise InputError(f"spec: no type in {dict(spec)}; expected one of {', '.join(MODULES.names())}")
    try:
        module: nn.Module = MODULES.get(spec["type"]).empty(spec)
    except (KeyError, TypeError) as error:
        raise InputError(f"spec: {spec['type']} lacks a setting or has a wrong one ({error})") from error
    return module


def structure_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path to spec of every treated layer in `model`, outermost modules only, and of every attachment."""
    found: dict[str, dict[str, Any]] = {}
    kinds = tuple(MODULES.get(name) for name in MODULES)
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, Attachment) or (isinstance(module, kinds) and not inside):
            found[path] = module.spec()
    return found


def rebuild_(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> None:
    """Swap empty treated layers into `model` as `structure_of` listed them, so that ``load_state_dict`` can follow.

    They are made on the device of what they replace (``meta`` included).

    Raises:
        InputError: a path that the model does not have, or a malformed spec.
    """
    for path in sorted(structure, key=lambda path: _turn(structure[path])):
        spec = structure[path]
        owner_path, _, name = path.rpartition(".")
        if _turn(spec) == len(_TURNS):
            _attach(model, path, spec)
            continue
        try:
            owner = model.get_submodule(owner_path)
            old = getattr(owner, name)
        except AttributeError:
            raise InputError(f"structure: the model has no layer {path}; it belongs to another model") from None
        with torch.device(_device_of(old)):
            new = module_from_spec(spec)
        if isinstance(new, ExpertStack):
            replace_parameter_(owner, name, new)
        elif isinstance(old, nn.Module):
            untie_(model, [f"{path}.weight"])
            if isinstance(new, Tied):
                new.link(model.get_submodule(new.to_path))
            _swap(model, old, new.train(old.training))
        else:
            raise InputError(f"structure: {path} is a parameter, expected a layer for {spec['type']}")


_TURNS = ("tied_linear", "tied_embedding")
"""What is built after the layers that it refers to; attachments come last, since their owner may be replaced."""


def _turn(spec: Mapping[str, Any]) -> int:
    kind = str(spec.get("type"))
    if kind in MODULES and issubclass(MODULES.get(kind), Attachment):
        return len(_TURNS)
    return int(kind in _TURNS)


def _attach(model: nn.Module, path: str, spec: Mapping[str, Any]) -> None:
    try:
        owner = model.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        raise InputError(f"structure: the model has no layer {path}; it belongs to another model") from None
    with torch.device(_device_of(owner)):
        attachment = module_from_spec(spec)
    assert isinstance(attachment, Attachment)
    attachment.attach_(owner).train(owner.training)


def _build(old: nn.Module, ref: LayerRef, stored: Stored, dtype: torch.dtype) -> nn.Module:
    """The treated module for `stored` with what `old` has besides its weight."""
    form = "low_rank" if stored.factors is not None else "sparse" if stored.mask is not None else "quantized"
    bias = getattr(old, "bias", None)
    if stored.parts is not None and (ref.layout not in ("linear", "conv1d") or isinstance(old, nn.Embedding)):
        raise InputError(f"{ref.path}: only the rows of a linear layer can have different widths")
    if ref.layout == "conv":
        _require_plain(old, ref.path, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        conv = _CONVS[form].from_stored(stored, bias, dtype, ConvSettings.of(old))
        return conv  # type: ignore[no-any-return]
    if isinstance(old, nn.Embedding):
        if form != "quantized":
            raise InputError(f"{ref.path}: an embedding can be quantized, not made {form.replace('_', ' ')}")
        if old.max_norm is not None:
            raise InputError(f"{ref.path}: its max_norm rewrites rows as they are read; a packed table cannot do that")
        multiplier = _multiplier(old, ref.path)
        return QuantEmbedding.from_stored(stored, dtype, padding_idx=old.padding_idx, multiplier=multiplier)
    if ref.layout == "linear":
        _require_plain(old, ref.path, (nn.Linear,))
    if stored.parts is not None:
        return MixedRowLinear.from_stored(stored, bias, dtype)
    linear = _LINEARS[form].from_stored(stored, bias, dtype)
    return linear  # type: ignore[no-any-return]


def _require_plain(module: nn.Module, path: str, kinds: tuple[type[nn.Module], ...]) -> None:
    """Refuse a layer that computes something else than its class's product.

    A linear layer with a forward of its own (Falcon's) is tried on two rows.
    """
    plain = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    if not plain and not (isinstance(module, nn.Linear) and nn.Linear in kinds and _multiplies(module)):
        names = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        raise InputError(f"{path}: {type(module).__name__} is not a plain {names}; leave this layer alone")


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Whether `module` gives ``x @ W.T + bias`` for two rows, up to rounding."""
    if module.weight.device.type == "meta":
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    expected = nn.functional.linear(x, module.weight, module.bias)
    try:
        given = module.forward(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return False
    off = (given.float() - expected.float()).norm()
    return bool(off <= 8 * torch.finfo(module.weight.dtype).eps * expected.float().norm())


@torch.no_grad()
def _multiplier(module: nn.Embedding, path: str) -> float:
    """The factor of a scaled embedding (``embed_scale``), 1 for a plain one; found, then checked on two rows."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "embed_scale", None)
    factor = scale.to(module.weight.dtype).item() if isinstance(scale, Tensor) else scale
    if isinstance(factor, int | float):
        ids = torch.tensor([0, module.num_embeddings - 1], device=module.weight.device)
        expected = nn.functional.embedding(ids, module.weight) * factor
        if torch.equal(module(ids), expected):
            return float(factor)
    raise InputError(f"{path}: {type(module).__name__} does more than look up rows; leave this layer alone")


def _follower(module: nn.Module, path: str, name: str) -> TiedLinear | TiedEmbedding:
    """What stands for `module`, which uses the weight of the layer at `path` under the full name `name`."""
    if isinstance(module, nn.Embedding):
        return TiedEmbedding(path, module.padding_idx, _multiplier(module, name))
    _require_plain(module, name, (nn.Linear,))
    bias = module.bias
    return TiedLinear(path, owned(bias, bias.dtype, bias.shape) if isinstance(bias, Tensor) else None)


def _replace_parameter(model: nn.Module, ref: LayerRef, stored: Stored, sharing: Sequence[str]) -> None:
    assert stored.dense is not None
    old = get_parameter(model, ref.parameter)
    dense = from_matrices(stored.dense.detach().to(old.device, old.dtype), ref.layout, old.shape)
    new = nn.Parameter(dense.clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)
    for full_name in (ref.parameter, *sharing):
        owner, _, name = full_name.rpartition(".")
        setattr(model.get_submodule(owner), name, new)


def _replace_experts(model: nn.Module, ref: LayerRef, stored: Stored) -> None:
    owner, _, name = ref.parameter.rpartition(".")
    old = get_parameter(model, ref.parameter)
    transposed = ref.layout == "experts_transposed"
    stack: ExpertStack
    if stored.factors is not None:
        stack = LowRankStack.from_stored(stored, old.dtype, transposed=transposed)
    elif stored.mask is not None:
        stack = SparseStack.from_stored(stored, old.dtype, transposed=transposed)
    else:
        stack = PackedStack.from_stored(stored, old.dtype, transposed=transposed)
    module = model.get_submodule(owner)
    replace_parameter_(module, name, stack.to(old.device).train(module.training))


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` everywhere in `model` where `old` stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _device_of(old: Any) -> torch.device:
    if isinstance(old, Tensor):
        return old.device
    tensors: Iterator[Tensor] = iter([*old.parameters(), *old.buffers()])
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
