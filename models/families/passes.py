"""What families do to tensors between the checkpoint's names and gguf's, as passes to put together.

Each pass takes all tensors by name and gives all tensors by name. A pattern is a regular expression that the whole
name must match.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from models.errors import TensorError
from models.families import Pass, Tensors
from models.hparams import Hparams
from models.weights import Index, Weights, stacked

# The other parts of a multimodal checkpoint. Source: llama.cpp, conversion/base.py `TextModel.filter_tensors`.
_OTHER_PARTS = re.compile(
    r"(mlp|vit\.|vpm\.|siglip2\.|conformer\.|merger\.|resampler\.|sound_|speech_).*"
    r"|.*(visual\.|vision[._]|audio[._]|talker\.|token2wav\.|code2wav\.|projector\.|pre_mm_projector_norm|image_newline"
    r"|view_seperator|patch_embed|patch_merger\.|patch_merge_mlp\.|model\.connector\.).*"
)


def each(pattern: str, change: Callable[[Weights, Hparams, re.Match[str]], Iterable[tuple[str, Weights]]]) -> Pass:
    """Put what `change` makes of a tensor, by name, in the place of each tensor whose name matches."""
    matches = re.compile(pattern).fullmatch

    def apply(tensors: Tensors, hparams: Hparams) -> Tensors:
        result: dict[str, Weights] = {}
        for name, weights in tensors.items():
            match = matches(name)
            changed = [(name, weights)] if match is None else _checked(change, weights, hparams, match)
            for new_name, new in changed:
                if new_name in result:
                    raise TensorError(f"tensor {new.name!r} is there twice, as {new_name}", tensor=new.name)
                result[new_name] = new
        return result

    return apply


def _checked(
    change: Callable[[Weights, Hparams, re.Match[str]], Iterable[tuple[str, Weights]]],
    weights: Weights,
    hparams: Hparams,
    match: re.Match[str],
) -> list[tuple[str, Weights]]:
    try:
        return list(change(weights, hparams, match))
    except (ValueError, IndexError) as error:  # of numpy: what a shape does not allow
        raise TensorError(
            f"tensor {weights.name!r} in {weights.file} has the shape {list(weights.shape)}, which the config does "
            f"not make: {error}",
            hint="The config does not belong to these weights.",
            tensor=weights.name,
        ) from error


def drop(pattern: str) -> Pass:
    """Tensors that llama.cpp does without."""
    return each(pattern, lambda weights, hparams, match: ())


def rename(pattern: str, replacement: str) -> Pass:
    """Another name, with the groups of the pattern in it: `rename(r"transformer\\.(.*)", r"model.\\1")`."""
    return each(pattern, lambda weights, hparams, match: [(match.expand(replacement), weights)])


def change(pattern: str, function: Callable[[Weights, Hparams], Weights]) -> Pass:
    """The same name, other weights."""
    return each(pattern, lambda weights, hparams, match: [(match.string, function(weights, hparams))])


def plus(pattern: str, addend: float) -> Pass:
    """Norms that are stored as their distance from one (Gemma)."""
    return change(pattern, lambda weights, hparams: weights.mapped(lambda values: values + np.float32(addend)))


def transposed(pattern: str) -> Pass:
    """Matrices that are stored with a column an output (GPT-2's Conv1D)."""
    return change(pattern, lambda weights, hparams: weights.transposed() if len(weights.shape) > 1 else weights)


def split(pattern: str, parts: Callable[[Hparams], Iterable[tuple[str, int]]]) -> Pass:
    """Rows that belong to several matrices: `parts` names them in order, with the number of rows of each.

    A name may refer to the groups of the pattern.
    """

    def cut(weights: Weights, hparams: Hparams, match: re.Match[str]) -> Iterable[tuple[str, Weights]]:
        named = list(parts(hparams))
        if sum(size for _, size in named) != weights.shape[0]:
            raise ValueError(f"{' + '.join(str(size) for _, size in named)} rows")
        first = 0
        for name, size in named:
            yield match.expand(name), weights.pick(weights.grid[first : first + size])
            first += size

    return each(pattern, cut)


def interleaved_rope(
    queries: str = r".*\.q_proj\.(weight|bias)", keys: str = r".*\.k_proj\.(weight|bias)"
) -> tuple[Pass, Pass]:
    """llama.cpp rotates neighbouring rows of a head, transformers its two halves: the rows change places."""
    return (
        change(queries, lambda weights, hparams: interleave_halves(weights, hparams.n_heads)),
        change(keys, lambda weights, hparams: interleave_halves(weights, hparams.n_heads_kv)),
    )


def interleave_halves(weights: Weights, n_heads: int) -> Weights:
    """Rows of whole heads from two halves to neighbouring pairs: row i of the first half, then of the second."""
    n_rows = weights.shape[0]
    if n_rows % (2 * n_heads):
        raise TensorError(
            f"tensor {weights.name!r} has {n_rows} rows, which {n_heads} heads do not divide", tensor=weights.name
        )
    return weights.pick(halves_interleaved(weights.grid, n_heads))


def halves_interleaved(rows: Index, n_heads: int) -> Index:
    """The order of rows that `interleave_halves` takes."""
    return rows.reshape(n_heads, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def without_other_parts(tensors: Tensors, hparams: Hparams) -> Tensors:
    """The text model of a multimodal checkpoint, under the names that it has alone."""
    result: dict[str, Weights] = {}
    for name, weights in tensors.items():
        if not (hparams.is_multimodal and _OTHER_PARTS.fullmatch(name)):
            name = name.replace("language_model.", "").replace("text_model.", "")
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            result[name] = weights
    return result


def halves(pattern: str, first: str, second: str) -> Pass:
    """Two matrices over each other, in one tensor or in each expert's: [2n, ...] or [experts, 2n, ...]."""

    def cut(weights: Weights, hparams: Hparams, match: re.Match[str]) -> Iterable[tuple[str, Weights]]:
        n = weights.shape[-2]
        if n % 2:
            raise ValueError(f"{n} rows are not two halves")
        grid = weights.grid
        yield match.expand(first), weights.pick(grid[..., : n // 2])
        yield match.expand(second), weights.pick(grid[..., n // 2 :])

    return each(pattern, cut)


def stack(pattern: str, replacement: str) -> Pass:
    """Tensors that are numbered by the group `n` of a pattern become one, with a new first dimension."""
    matches = re.compile(pattern).fullmatch

    def apply(tensors: Tensors, hparams: Hparams) -> Tensors:
        result: dict[str, Weights] = {}
        groups: defaultdict[str, dict[int, Weights]] = defaultdict(dict)
        for name, weights in tensors.items():
            if match := matches(name):
                groups[match.expand(replacement)][int(match["n"])] = weights
            else:
                result[name] = weights
        for name, parts in groups.items():
            missing = next((number for number in range(max(parts) + 1) if number not in parts), None)
            if missing is not None:
                raise TensorError(f"number {missing} is missing of {name}", hint="Is a shard missing?", tensor=name)
            try:
                result[name] = stacked([parts[number] for number in sorted(parts)])
            except ValueError as error:
                raise TensorError(f"the parts of {name} have different shapes", tensor=name) from error
        return result

    return apply


_EACH_EXPERT = stack(r"(.*\.experts)\.(?P<n>\d{1,6})\.(.+)", r"\1.\3")
_GATE_AND_UP = halves(r"(.*\.experts\.)gate_up_proj", r"\1gate_proj.weight", r"\1up_proj.weight")
_DOWN = rename(r"(.*\.experts\.down_proj)", r"\1.weight")


def stack_experts(tensors: Tensors, hparams: Hparams) -> Tensors:
    """One tensor for all experts of a block; gate and up that transformers 5 keeps in one come apart.

    Raises TensorError if one of them is missing or has another shape.
    """
    for step in (_EACH_EXPERT, _GATE_AND_UP, _DOWN):
        tensors = step(tensors, hparams)
    return tensors


def without_blocks_beyond(tensors: Tensors, hparams: Hparams) -> Tensors:
    """Leaves out what comes after the last block: layers that predict several tokens, which llama.cpp does without."""
    last = hparams.n_layers
    kept = {}
    for name, weights in tensors.items():
        match = re.match(r"model\.layers\.(\d{1,6})\.", name)
        if match is None or int(match[1]) < last:
            kept[name] = weights
    return kept


def negative_exponential(weights: Weights, hparams: Hparams) -> Weights:
    """The decay of a state, which checkpoints hold as a logarithm."""
    return weights.mapped(lambda values: -np.exp(values.astype(np.float64)))


def flat(weights: Weights, hparams: Hparams) -> Weights:
    """Kernels of a convolution over single channels, from [n, 1, width] to [n, width]."""
    return weights.reshaped(weights.shape[0], -1)


def column(weights: Weights, hparams: Hparams) -> Weights:
    """A value for each head, [n, 1]."""
    return weights.reshaped(weights.n_weights, 1)


def own_output(embedding: str, output: str) -> Pass:
    """llama.cpp wants an output matrix of these models where the embedding serves as one, too."""

    def apply(tensors: Tensors, hparams: Hparams) -> Tensors:
        if output in tensors or embedding not in tensors or not hparams.ties_embeddings:
            return tensors
        return {**tensors, output: tensors[embedding]}

    return apply
