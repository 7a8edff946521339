"""Tiny models of random weights, one of each kind of memory: dense, sliding window, recurrent, hybrid; and experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from convert.converter import convert_checkpoint
from convert.file_types import file_type
from runner.engine.context import Context
from tests.checkpoints import Json, Tensors, tiny_config, tiny_tensors, write_json, write_shards, write_tiny_tokenizer

KINDS = ("dense", "window", "recurrent", "hybrid")
WINDOW = 32

_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
_TEMPLATE = _TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


def write_model(kind: str, folder: Path) -> Path:
    """A GGUF of `kind` in `folder`, with F32 weights."""
    source = folder / kind
    source.mkdir(parents=True)
    makers = {"dense": _dense, "window": _window, "recurrent": _recurrent, "hybrid": _hybrid, "experts": _experts}
    config, tensors = makers[kind]()
    write_json(source / "config.json", config)
    write_shards(source, tensors, 1)
    write_tiny_tokenizer(source)
    write_json(
        source / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": _TEMPLATE},
    )
    return convert_checkpoint(source, folder / f"{kind}.gguf", file_type("F32")).path


def _dense() -> tuple[Json, Tensors]:
    config = tiny_config(max_position_embeddings=4096)
    return config, tiny_tensors(config, "F32")


def _random(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    random = np.random.default_rng(2)
    return {
        name: random.standard_normal(shape, dtype=np.float32) * np.float32(0.2) + np.float32("norm" in name)
        for name, shape in shapes.items()
    }


def _window() -> tuple[Json, Tensors]:
    config = tiny_config(
        "Gemma3ForCausalLM",
        max_position_embeddings=4096,
        head_dim=16,
        hidden_activation="gelu_pytorch_tanh",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    del config["hidden_act"]
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(2):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.{part}_norm.weight": (16,) for part in "qk"}
        shapes |= {f"{at}.{when}_feedforward_layernorm.weight": (64,) for when in ("pre", "post")}
    return config, tiny_tensors(config, "F32") | _random(shapes)


def _recurrent() -> tuple[Json, Tensors]:
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 4,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": (320, 64), "backbone.norm_f.weight": (64,)}
    for block in range(2):
        at = f"backbone.layers.{block}"
        shapes |= {
            f"{at}.norm.weight": (64,),
            f"{at}.mixer.A_log": (128, 16),
            f"{at}.mixer.D": (128,),
            f"{at}.mixer.conv1d.weight": (128, 1, 4),
            f"{at}.mixer.conv1d.bias": (128,),
            f"{at}.mixer.dt_proj.weight": (128, 4),
            f"{at}.mixer.dt_proj.bias": (128,),
            f"{at}.mixer.in_proj.weight": (256, 64),
            f"{at}.mixer.out_proj.weight": (64, 128),
            f"{at}.mixer.x_proj.weight": (36, 128),
        }
    tensors = _random(shapes)
    for name in tensors:
        if name.endswith("A_log"):
            tensors[name] -= 4  # a state that lasts for some hundred tokens
    return config, tensors


def _hybrid() -> tuple[Json, Tensors]:
    kinds = ["conv", "full_attention", "conv"]
    config = tiny_config(
        "Lfm2ForCausalLM",
        model_type="lfm2",
        num_hidden_layers=3,
        layer_types=kinds,
        conv_L_cache=3,
        conv_bias=False,
        norm_eps=1e-5,
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    for name in ("hidden_act", "rms_norm_eps"):
        del config[name]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (320, 64),
        "model.embedding_norm.weight": (64,),
    }
    for block, kind in enumerate(kinds):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.{norm}_norm.weight": (64,) for norm in ("operator", "ffn")}
        shapes |= {f"{at}.feed_forward.w{i}.weight": (128, 64) if i != 2 else (64, 128) for i in (1, 2, 3)}
        if kind == "conv":
            shapes |= {
                f"{at}.conv.conv.weight": (64, 1, 3),
                f"{at}.conv.in_proj.weight": (192, 64),
                f"{at}.conv.out_proj.weight": (64, 64),
            }
        else:
            shapes |= {f"{at}.self_attn.{part}_proj.weight": (64, 64) for part in ("q", "out")}
            shapes |= {f"{at}.self_attn.{part}_proj.weight": (32, 64) for part in "kv"}
            shapes |= {f"{at}.self_attn.{part}_layernorm.weight": (16,) for part in "qk"}
    return config, _random(shapes)


def assert_taken_back(context: Context) -> None:
    """Tokens on trial that are taken back leave what computing the others afresh does."""
    held = [*range(5, 60)]
    rows = []
    context.clear()
    context.extend(held)
    for back in (3, context.most_drafted, 1, 0, 2):
        batch = [100 + back, *range(70, 70 + context.most_drafted)]
        context.advance(batch, interruptible=False)
        context.truncate(len(context.held) - back)
        held += batch[: len(batch) - back]
        assert context.held == held
        context.advance([200], interruptible=False)
        held.append(200)
        rows.append((len(held), context.logits(0).astype(float)))
    for n, ours in rows:
        context.clear()
        context.extend(held[:n])
        fresh = context.logits().astype(float)
        assert float(ours @ fresh / np.linalg.norm(ours) / np.linalg.norm(fresh)) > 0.99999


def _experts() -> tuple[Json, Tensors]:
    config = tiny_config(
        "MixtralForCausalLM",
        num_hidden_layers=6,
        max_position_embeddings=4096,
        num_local_experts=8,
        num_experts_per_tok=2,
        intermediate_size=256,
        sliding_window=None,
    )
    tensors = {name: array for name, array in tiny_tensors(config, "F32").items() if ".mlp." not in name}
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(6):
        at = f"model.layers.{block}.block_sparse_moe"
        shapes[f"{at}.gate.weight"] = (8, 64)
        for expert in range(8):
            shapes |= {f"{at}.experts.{expert}.w{i}.weight": (256, 64) if i != 2 else (64, 256) for i in (1, 2, 3)}
    return config, tensors | _random(shapes)
