"""gpt-oss."""

from collections.abc import Iterable
from re import Match

from models.families import ModelFamily
from models.families.keys import integer, sliding_pattern
from models.families.passes import each, rename, transposed
from models.hparams import Hparams
from models.weights import Weights


def _gates_and_ups(weights: Weights, hparams: Hparams, match: Match[str]) -> Iterable[tuple[str, Weights]]:
    """Rows of the gate and rows of the other matrix in turns."""
    for first, part in enumerate(("gate", "up")):
        yield f"{match[1]}.{part}_proj.weight", weights.pick(weights.grid[:, first::2])


def _gate_and_up_biases(weights: Weights, hparams: Hparams, match: Match[str]) -> Iterable[tuple[str, Weights]]:
    values = weights.reshaped(weights.n_weights)  # single elements, so that each other one can be picked
    n_experts, width = weights.shape
    for first, part in enumerate(("gate", "up")):
        picked = values.pick(values.grid.reshape(n_experts, width)[:, first::2].reshape(-1))
        yield f"{match[1]}.{part}_proj.bias", picked.reshaped(n_experts, width // 2)


# transformers, GptOssConfig; llama.cpp has the limits of its activation in its code
GPT_OSS = ModelFamily(
    architectures=("GptOssForCausalLM",),
    gguf_arch="gpt-oss",
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "head_dim": 64,
        "sliding_window": 128,
        "num_experts": 128,
        "num_experts_per_tok": 4,
    },
    requires={"swiglu_limit": (None, 7.0), "swiglu_alpha": (None, 1.702)},
    keys={
        "attention.sliding_window": integer("sliding_window"),
        "attention.sliding_window_pattern": sliding_pattern(2),
        "expert_feed_forward_length": integer("intermediate_size"),
    },
    passes=(
        rename(r"(.*\.sinks)", r"\1.weight"),
        rename(r"(.*\.experts\.down_proj)_bias", r"\1.bias"),
        transposed(r".*\.experts\.(gate_up_proj|down_proj)"),
        each(r"(.*\.experts)\.gate_up_proj(?:\.weight)?", _gates_and_ups),
        each(r"(.*\.experts)\.gate_up_proj_bias", _gate_and_up_biases),
    ),
    ignored=("experts_per_token", "initial_context_length", "swiglu_limit"),
)
