"""The published systems whose parts this package holds, and the last verdict of each study."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.evidence import Evidence

__all__ = [
    "SYSTEMS",
    "System",
    "list_systems",
    "markdown_table",
    "resolve",
    "save_verdict",
    "system",
    "verdicts_file",
]


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: its name in commands; the study is ``layerwright.studies.<slug with underscores>``.
        title: of the paper.
        authors: first author, or all of few.
        year: of the first version.
        arxiv: identifier.
        idea: one sentence.
        rooms: where its parts live.
        objects: public objects, as dotted names below ``layerwright``.
        recipes: names of its recipes.
        verdict: of the last run of its study on this machine, or ``not run``.
    """

    slug: str
    title: str
    authors: str
    year: int
    arxiv: str
    idea: str
    rooms: tuple[str, ...]
    objects: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    verdict: str = "not run"

    @property
    def paper(self) -> str:
        """``Authors (year), arXiv 1234.56789``."""
        return f"{self.authors} ({self.year}), arXiv {self.arxiv}"

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "slug": self.slug,
            "title": self.title,
            "paper": self.paper,
            "authors": self.authors,
            "year": self.year,
            "arxiv": self.arxiv,
            "idea": self.idea,
            "rooms": list(self.rooms),
            "objects": list(self.objects),
            "recipes": list(self.recipes),
            "verdict": self.verdict,
        }


SYSTEMS: tuple[System, ...] = (
    System(
        slug="acm",
        title="Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference",
        authors="Wójcik et al.",
        year=2023,
        arxiv="2312.10193",
        idea="Let each token choose how many small learners of a layer it runs, under a budget for the average.",
        rooms=("nn", "treat", "tune"),
        objects=(
            "nn.adaptive.AdaptiveComputationModule",
            "treat.acmize.acmize",
            "treat.acmize.find_acm",
            "tune.acm.acm",
            "tune.acm.distill_modules",
            "tune.acm.pretrain_gates",
            "tune.acm.ACMObjective",
        ),
    ),
    System(
        slug="adamole",
        title="AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation Experts",
        authors="Liu, Luo",
        year=2024,
        arxiv="2405.00361",
        idea="Split one low-rank adapter into experts, and let a learned threshold decide for each token how many serve it.",
        rooms=("nn", "tune", "explain"),
        objects=(
            "nn.LoRAMixture",
            "tune.attach_lora_mixture",
            "tune.save_adapter",
            "tune.adamole.adamole",
            "explain.expert_usage",
        ),
    ),
    System(
        slug="adaquant",
        title="Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
        authors="Hubara, Nahshan, Hanani, Banner, Soudry",
        year=2020,
        arxiv="2006.10518",
        idea="Calibrate each quantized layer on few samples, and give bits to layers by an integer program.",
        rooms=("score", "allocate", "treat", "tune"),
        objects=(
            "score.loss_swap",
            "allocate.integer",
            "treat.fold.fold_batchnorm",
            "tune.AdaQuant",
            "tune.renormalize",
            "tune.bias_tune",
        ),
        recipes=("adaquant", "adaquant_light"),
    ),
    System(
        slug="cost-eff",
        title="COST-EFF: Collaborative Optimization of Spatial and Temporal Efficiency with Slenderized Multi-exit Language Models",
        authors="Shen et al.",
        year=2022,
        arxiv="2210.15523",
        idea="Narrow an encoder by scores of all its exits, each taught by that of a wider assistant; samples leave when they are sure.",
        rooms=("nn", "score", "allocate", "treat", "tune"),
        objects=(
            "nn.encoder_exits.MultiExit",
            "nn.scaled_gradient.scale_gradient",
            "nn.factorized_embedding.FactorizedEmbedding",
            "score.exit_taylor.exit_taylor",
            "score.exit_curve.exit_curve",
            "allocate.width_schedule.width_schedule",
            "treat.encoder_exits.add_encoder_exits",
            "treat.prune_heads.prune_heads_",
            "treat.factorize.factorize_embedding",
            "tune.multi_exit.MultiExitDistillation",
            "tune.cost_eff.cost_eff",
        ),
    ),
    System(
        slug="dlo",
        title="DLO: Dynamic Layer Operation for Efficient Vertical Scaling of LLMs",
        authors="Tan, Dong et al.",
        year=2024,
        arxiv="2407.11030",
        idea="Put identity blocks between the others, and let each token skip the feed-forward parts that turn it least.",
        rooms=("treat", "tune"),
        objects=(
            "treat.expand.expand_blocks",
            "treat.route.route_tokens",
            "tune.dlo.DLOObjective",
            "tune.dlo.capacity_learning_rates",
            "tune.dlo.dlo",
        ),
    ),
    System(
        slug="duplex",
        title="Duplex: A Device for Large Language Models with Mixture of Experts, Grouped Query Attention, and"
        " Continuous Batching",
        authors="Yun et al.",
        year=2024,
        arxiv="2409.01141",
        idea="Run layers with few operations per byte on a second processor close to the memory; share experts between both.",
        rooms=("score", "allocate", "recipes"),
        objects=(
            "score.device.LMShape",
            "score.device.layer_costs",
            "allocate.coprocess.op_per_byte_plan",
            "allocate.coprocess.split_experts",
            "recipes.serving.ServingSimulator",
            "recipes.place.place_job",
        ),
    ),
    System(
        slug="eas",
        title="Efficient Architecture Search by Network Transformation",
        authors="Cai, Chen, Zhang, Yu, Wang",
        year=2017,
        arxiv="1707.04873",
        idea="Search networks by growing a trained one: each candidate inherits its function, a controller learns where.",
        rooms=("treat", "allocate", "models", "recipes"),
        objects=(
            "treat.grow.widen",
            "treat.grow.deepen",
            "treat.grow.widen_mlp",
            "treat.grow.GrowthMap",
            "allocate.controller.MetaController",
            "allocate.controller.search",
            "models.PlainCNN",
            "models.DenseNetBC",
            "recipes.grow.grow_search",
        ),
    ),
    System(
        slug="edge-llm",
        title="EDGE-LLM: Enabling Efficient Large Language Model Adaptation on Edge Devices via Layerwise Unified "
        "Compression and Adaptive Layer Tuning and Voting",
        authors="Yu et al.",
        year=2024,
        arxiv="2406.15758",
        idea="Compress each layer by what it can bear, tune a few layers below one exit at a time, let all exits vote.",
        rooms=("score", "allocate", "treat", "tune", "nn", "recipes"),
        objects=(
            "score.compression_probes.compression_sensitivity",
            "score.gemm_schedule.gemm_schedule",
            "allocate.luc.luc",
            "treat.exits.add_exits",
            "nn.rounded_cache.round_cache_",
            "tune.window.WindowTuner",
            "tune.vote.vote",
            "recipes.luc.decide_luc",
        ),
        recipes=("edge_llm",),
    ),
    System(
        slug="emq",
        title="EMQ: Evolving Training-free Proxies for Automated Mixed Precision Quantization",
        authors="Dong et al.",
        year=2023,
        arxiv="2307.10554",
        idea="Evolve an expression over layer statistics that ranks bit vectors without training, and search bits by it.",
        rooms=("score", "allocate", "recipes"),
        objects=(
            "score.proxies.ProxyTree",
            "score.proxies.layer_statistics",
            "score.proxies.evolve_proxy",
            "score.proxies.emq",
            "allocate.bit_search.search_bits",
            "allocate.bit_search.bit_search",
            "recipes.bench_mq.build_bench",
            "recipes.bench_mq.rank_proxies",
        ),
        recipes=("emq",),
    ),
    System(
        slug="evol-q",
        title="Jumping through Local Minima: Quantization in the (Jagged) Loss Landscape of Vision Transformers",
        authors="Frumkin, Gope, Marculescu",
        year=2023,
        arxiv="2308.10814",
        idea="Evolve the weight scales of a quantized model block by block under a contrastive loss on its outputs.",
        rooms=("tune", "explain"),
        objects=(
            "tune.evolq.EvolQ",
            "tune.losses.info_nce_outputs",
            "explain.scale_landscape.scale_landscape",
            "core.kept_blocks.KeptBlocks",
        ),
        recipes=("evol_q",),
    ),
    System(
        slug="fptq",
        title="FPTQ: Fine-grained Post-Training Quantization for Large Language Models",
        authors="Li et al.",
        year=2023,
        arxiv="2308.15987",
        idea="Int4 weights and int8 activations; each layer's range says whether they are static, equalized or dynamic.",
        rooms=("score", "allocate", "treat", "nn"),
        objects=(
            "score.activation_range.activation_range",
            "allocate.activation_strategy.fptq_strategy",
            "treat.log_equalize.log_equalize_",
            "nn.w4a8.W4A8Linear",
            "recipes.fptq.fptq_plan",
        ),
        recipes=("fptq",),
    ),
    System(
        slug="layernorm-scaling",
        title="The Curse of Depth in Large Language Models",
        authors="Sun, Song, Li et al.",
        year=2025,
        arxiv="2502.05795",
        idea="Divide what the norms of block l give by the root of l, so that deep blocks go on changing the stream.",
        rooms=("nn", "treat", "score"),
        objects=(
            "treat.layernorm_scaling.apply_layernorm_scaling",
            "nn.residual_block.ResidualBlock",
            "score.depth_effect.residual_variance",
            "score.depth_effect.angular_distance",
            "score.depth_effect.drop_impact",
            "score.depth_effect.identity_gap",
        ),
    ),
    System(
        slug="lora-layer-pruning",
        title="Parameter-Efficient Fine-Tuning with Layer Pruning on Free-Text Sequence-to-Sequence Modeling",
        authors="Zhu et al.",
        year=2023,
        arxiv="2305.08285",
        idea="Drop every second middle block of both stacks first, then train adapters on the feed-forward layers left.",
        rooms=("allocate", "treat", "tune"),
        objects=(
            "allocate.interleaved.interleaved_keep",
            "treat.drop.keep_blocks",
            "tune.lora.attach_lora",
            "tune.prune_then_lora.prune_then_lora",
            "tune.prune_then_lora.step_cost",
        ),
        recipes=("lora-layer-pruning",),
    ),
    System(
        slug="lrp-qvit",
        title="LRP-QViT: Mixed-Precision Vision Transformer Quantization via Layer-wise Relevance Propagation",
        authors="Ranjan, Savakis",
        year=2024,
        arxiv="2401.11243",
        idea="Give bits to layers by what they contribute to the prediction; clip outlier channels, then share one range.",
        rooms=("score", "treat", "explain", "recipes"),
        objects=(
            "explain.lrp",
            "score.relevance.lrp_contribution",
            "treat.reparameterize.clip_channel_params",
            "treat.reparameterize.reparameterize_",
            "recipes.attention_sites.product_bits",
        ),
        recipes=("lrp_qvit",),
    ),
    System(
        slug="mixed-td",
        title="Mixed-TD: Efficient Neural Network Accelerator with Layer-Specific Tensor Decomposition",
        authors="Yu, Bouganis",
        year=2023,
        arxiv="2306.05021",
        idea="Choose SVD or CP, its shape and rank for each convolution by the throughput of a streaming device.",
        rooms=("score", "allocate", "treat", "recipes"),
        objects=(
            "treat.factorize.factorize_conv",
            "treat.factorize.factor_cost",
            "score.dataflow.DataflowModel",
            "allocate.divisors.divisor_rich_ranks",
            "allocate.factor_options.enumerate_factorizations",
            "allocate.evolve_surrogate.evolve",
            "recipes.mixed_td.mixed_td",
        ),
        recipes=("mixed_td",),
    ),
    System(
        slug="mixllm",
        title="MixLLM: LLM Quantization with Global Mixed-precision between Output-features",
        authors="Zheng, Song, Liu",
        year=2024,
        arxiv="2412.14590",
        idea="Give 8 bits to the output rows, over all layers together, whose rounding moves the loss most, 4 to the others.",
        rooms=("score", "allocate", "treat", "nn"),
        objects=(
            "score.output_rows.output_row_loss",
            "allocate.global_rows.global_rows",
            "treat.quantize.mix_rows",
            "nn.mixed_rows.MixedRowLinear",
        ),
        recipes=("mixllm",),
    ),
    System(
        slug="mptq-vit",
        title="MPTQ-ViT: Mixed-Precision Post-Training Quantization for Vision Transformer",
        authors="Tai, Wu",
        year=2024,
        arxiv="2401.14895",
        idea="Centre and smooth norm outputs, give long tails two grids, and lower bits where measured damage is least.",
        rooms=("treat", "nn", "allocate", "recipes"),
        objects=(
            "treat.smooth.smooth_",
            "treat.activations.search_region_ratio",
            "nn.two_regions.region_codes",
            "allocate.measured_descent.greedy_descent",
            "recipes.mixed_precision.MixedPrecision",
        ),
        recipes=("mptq_vit",),
    ),
    System(
        slug="peer",
        title="Mixture of A Million Experts",
        authors="Xu Owen He",
        year=2024,
        arxiv="2407.04153",
        idea="Make a feed-forward part of up to a million one-neuron experts, of which each token retrieves a few by product keys.",
        rooms=("nn", "treat", "tune", "explain"),
        objects=(
            "nn.peer.PEER",
            "nn.product_keys.ProductKeyRouter",
            "treat.swap_peer.swap_peer",
            "tune.peer.peer",
            "explain.retrieved_experts.retrieved_experts",
        ),
    ),
    System(
        slug="scaling-laws",
        title="Scaling Laws for Neural Language Models",
        authors="Kaplan, McCandlish et al.",
        year=2020,
        arxiv="2001.08361",
        idea="Fit power laws of size, data and steps to small runs, and divide the compute of a large one by them.",
        rooms=("theory",),
        objects=(
            "theory.scaling.fit_law",
            "theory.scaling.RunTable",
            "theory.scaling.critical_batch",
            "theory.scaling.noise_scale",
            "theory.scaling.allocate_compute",
            "theory.scaling.plan_runs",
        ),
    ),
    System(
        slug="shortened-llama",
        title="Shortened LLaMA: A Simple Depth Pruning for Large Language Models",
        authors="Kim et al.",
        year=2024,
        arxiv="2402.02834",
        idea="Rank whole blocks by one simple criterion, remove the lowest at once, and retrain briefly.",
        rooms=("score", "allocate", "treat", "tune"),
        objects=(
            "score.block_magnitude",
            "score.block_taylor",
            "score.block_perplexity",
            "allocate.keep_blocks",
            "allocate.one_shot",
            "treat.drop.drop_blocks",
            "core.skip.skip_blocks",
            "tune.lora",
            "tune.full",
        ),
        recipes=(
            "shortened-llama",
            "shortened-llama-taylor",
            "shortened-llama-magnitude",
            "shortened-llama-similarity",
            "shortened-llama-iterative",
            "shortened-llama-cpt",
        ),
    ),
    System(
        slug="squeeze-attention",
        title="SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal Budget",
        authors="Wang, Cui, Gan",
        year=2024,
        arxiv="2404.04793",
        idea="Cache few tokens in layers whose attention changes the stream little, and give what that frees to the others.",
        rooms=("score", "allocate", "nn", "recipes"),
        objects=(
            "score.attention_prompt.attention_prompt_similarity",
            "allocate.kv_budgets.kv_budgets",
            "nn.kv.cache.BudgetedCache",
            "nn.kv.attention.budgeted_attention",
            "nn.kv.make_cache",
            "recipes.squeeze.squeeze",
            "recipes.squeeze.decide_squeeze",
        ),
        recipes=("squeeze_attention",),
    ),
    System(
        slug="subtuning",
        title="Less is More: Selective Layer Finetuning with SubTuning",
        authors="Kaplun, Gurevich, Swisa, David, Shalev-Shwartz, Malach",
        year=2023,
        arxiv="2302.06354",
        idea="Train a few blocks, chosen greedily by cross-validated accuracy, and a new readout; tasks share the rest.",
        rooms=("score", "allocate", "tune", "treat"),
        objects=(
            "score.finetuning_profile.finetuning_profile",
            "allocate.greedy_blocks.greedy_blocks",
            "tune.subtune.subtune",
            "tune.feature_cache.FeatureCache",
            "tune.subtuning.subtuning",
            "treat.multi_task.MultiTaskModel",
        ),
    ),
    System(
        slug="todm",
        title="TODM: Train Once Deploy Many Efficient Supernet-Based RNN-T Compression For On-device ASR Models",
        authors="Shangguan et al.",
        year=2023,
        arxiv="2309.01947",
        idea="Train a supernet whose largest network teaches smaller ones in place, and deploy slices of it at many sizes.",
        rooms=("nn", "models", "tune", "treat", "train", "allocate", "data", "score"),
        objects=(
            "nn.elastic.ElasticFFN",
            "nn.state_space.MultiHeadSSM",
            "nn.transducer_loss.transducer_loss",
            "models.rnnt.RNNT",
            "tune.supernet.Supernet",
            "tune.supernet.sandwich_step",
            "tune.alpha_divergence.alpha_divergence",
            "treat.subnet.extract_subnet",
            "train.ScaledAdam",
            "train.Eden",
            "allocate.subnet_search.search_subnets",
            "data.speech.small_speech",
            "score.token_errors.token_error_rate",
        ),
    ),
    System(
        slug="trol",
        title="TroL: Traversal of Layers for Large Language and Vision Models",
        authors="Lee et al.",
        year=2024,
        arxiv="2406.12246",
        idea="Run every block twice on the prompt, and let a gate for each token blend the two results.",
        rooms=("treat", "tune", "models"),
        objects=(
            "treat.traverse.traverse",
            "treat.traverse.TraversalHandle",
            "tune.two_step.two_step",
            "models.TinyVLM",
        ),
    ),
)
"""All systems, by slug in alphabetical order."""


def system(slug: str) -> System:
    """The entry of that slug; dashes and underscores count alike.

    Raises:
        InputError: unknown; close matches are listed.
    """
    found = {item.slug: item for item in SYSTEMS}
    if slug.replace("_", "-") not in found:
        raise unknown_name("study", slug, found)
    return found[slug.replace("_", "-")]


def list_systems() -> tuple[System, ...]:
    """Every system, with the verdict of the last run of its study."""
    verdicts = read_verdicts()
    return tuple(replace(item, verdict=verdicts.get(item.slug, {}).get("verdict", "not run")) for item in SYSTEMS)


def resolve(name: str) -> Any:
    """The object of that dotted name below ``layerwright``.

    Raises:
        InputError: there is none.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(f"layerwright.{module}"), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name}: no such object below layerwright ({error})") from error


# -- verdicts -----------------------------------------------------------------------------------------------------


def verdicts_file() -> Path:
    """Where the last verdict of each study is kept: ``~/.cache/layerwright/verdicts.json``, or below
    ``$XDG_CACHE_HOME``.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "layerwright" / "verdicts.json"


def read_verdicts() -> dict[str, dict[str, Any]]:
    """The kept verdicts by slug; nothing where the file is missing or damaged."""
    try:
        data = json.loads(verdicts_file().read_text())
    except (OSError, ValueError):
        return {}
    return {slug: item for slug, item in data.items() if isinstance(item, dict)} if isinstance(data, dict) else {}


def save_verdict(evidence: Evidence, *, quick: bool) -> None:
    """Keep the verdict of `evidence`; where the folder cannot be written, nothing is kept."""
    path = verdicts_file()
    verdicts = read_verdicts()
    verdicts[evidence.slug] = {
        "verdict": f"{evidence.verdict}{' (quick)' if quick else ''}",
        "checks": [check.to_data() for check in evidence.checks],
        "seconds": evidence.seconds,
        "seeds": list(evidence.seeds),
        "versions": dict(evidence.versions),
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(verdicts, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None


# -- documentation ------------------------------------------------------------------------------------------------


def markdown_table() -> str:
    """The systems as a Markdown table: name, paper, idea, rooms, objects."""
    lines = ["| system | paper | idea | parts |", "| --- | --- | --- | --- |"]
    for item in SYSTEMS:
        link = f"[{item.authors}, {item.year}](https://arxiv.org/abs/{item.arxiv})"
        parts = ", ".join(f"`{name}`" for name in item.objects)
        lines.append(f"| `{item.slug}` | {link} | {item.idea} | {parts} |")
    return "\n".join(lines) + "\n"
