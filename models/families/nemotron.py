"""Nemotron, and Apertus."""

from models.families import ModelFamily
from models.families import vocabulary as rules
from models.families.keys import head_dim, integer, number, rotary_dim
from models.families.passes import drop, plus
from models.hparams import Hparams

# transformers, NemotronConfig
NEMOTRON = ModelFamily(
    architectures=("NemotronForCausalLM",),
    gguf_arch="nemotron",
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "hidden_act": "relu2",
    },
    requires={"hidden_act": ("relu2",), "kv_channels": lambda hparams: (None, hparams.head_dim)},
    keys={
        "vocab_size": integer("vocab_size"),
        "attention.layer_norm_epsilon": number("rms_norm_eps"),
        "rope.dimension_count": rotary_dim,
        "rope.scaling.type": lambda hparams: "linear" if hparams.rope.has("factor") else "none",
    },
    passes=(plus(r".*norm\.weight", 1),),
    vocabulary=rules.NEMOTRON,
)


def _of_activations(hparams: Hparams, name: str) -> list[float]:
    """A learnt number of the activation of each block."""
    tensors = hparams.tensors
    names = (f"model.layers.{block}.mlp.act_fn.{name}" for block in range(hparams.n_layers))
    return [float(tensors[entry].values().reshape(-1)[0]) for entry in names if entry in tensors]


# transformers, ApertusConfig
APERTUS = ModelFamily(
    architectures=("ApertusForCausalLM",),
    gguf_arch="apertus",
    defaults={"max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 12000000.0, "hidden_act": "xielu"},
    requires={"hidden_act": ("xielu",), "post_norm": (None, False), "qk_norm": (None, True)},
    keys={
        "vocab_size": integer("vocab_size"),
        "rope.dimension_count": head_dim,
        "/xielu.alpha_n": lambda hparams: _of_activations(hparams, "alpha_n"),
        "/xielu.alpha_p": lambda hparams: _of_activations(hparams, "alpha_p"),
        "/xielu.beta": lambda hparams: _of_activations(hparams, "beta"),
        "/xielu.eps": lambda hparams: _of_activations(hparams, "eps"),
    },
    passes=(drop(r".*\.act_fn\.(alpha_n|alpha_p|beta|eps)"),),
    vocabulary=rules.APERTUS,
)
