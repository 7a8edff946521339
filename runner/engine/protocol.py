"""What an engine is, as the rest of the runner sees it.

`ChatSession`, the command line and the terminal know this file and nothing of llama.cpp. Tests of them use a
`FakeEngine` that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

if TYPE_CHECKING:
    from runner.bench import Speed

FinishReason = Literal["stop", "length", "cancelled"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn. `tokens` are the ids of a reply as they were sampled: text need not tokenize back to them."""

    role: Role
    content: str
    tokens: tuple[int, ...] = ()


SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""llama.cpp's samplers by llama.cpp's names, in its order."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked, and when a reply ends. A temperature of 0 is greedy and repeatable.

    The defaults are llama.cpp's. What each number may be: `runner.engine.recommended.LIMITS`.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    """The same seed gives the same reply; None is another one each time."""
    max_tokens: int | None = None
    penalty_last_n: int = 64
    """Tokens that the three penalties look back on."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    """0 turns DRY off: it makes a token less likely the longer the repetition that it would continue."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = 64
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    top_n_sigma: float = 0.0
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    """1 or 2: mirostat in place of everything between the logit bias and the temperature, as llama.cpp has it."""
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    samplers: tuple[str, ...] = SAMPLERS
    grammar: str | None = None
    """GBNF. Only what it allows is picked, and the reply ends where it does."""
    stop: tuple[str, ...] = ()
    """Texts before which the reply ends, in the answer, not in a thought."""
    logprobs: int | None = None
    """With each token its log probability and those of this many best ones; None: not even its own."""
    think: bool | None = None
    """Whether the model thinks before it answers, by its template's own switch; None: as the template has it."""
    think_budget: int | None = None
    """Tokens of thought after which the answer is made to begin."""


@dataclass(frozen=True)
class GenerationStats:
    """Counts in tokens, times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    generate_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of those drafted, how many came out right and so cost no step of their own."""
    shifted_tokens: int = 0
    """Of prompt and reply, the oldest that went to make room for more."""
    thought_tokens: int = 0
    """Of those generated, how many the thought took."""

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.generate_seconds if self.generate_seconds > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of what the model gave a token and the best ones, before any sampler; best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of a reply.

    `text` is of the answer, `thought` of what the model thinks before it. Both hold whole characters only and may be
    empty. `token` is None in the last chunk, which carries `finish_reason`, and in one that only brings a `notice`;
    the end-of-generation token itself never comes out.
    """

    text: str
    token: int | None
    stats: GenerationStats = field(default_factory=GenerationStats)
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    thought: str = ""
    thinking: bool = False
    """Whether the token comes before the answer: of the thought, or of the marks around it."""
    notice: str = ""
    """What happened meanwhile, in a line: a device that was lost, memory that runs out."""


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model says of itself, and where it was put."""

    path: Path
    name: str
    description: str
    n_ctx: int
    n_ctx_train: int
    n_layers: int
    """Layers that can be placed, as llama.cpp counts them: every block, and the output as one more."""
    gpu_layers: int
    device: str
    load_seconds: float
    threads: int = 1
    batch: int = 512
    """Tokens of a prompt that are computed at once."""
    device_names: tuple[str, ...] = ()
    """Of `device`, what llama.cpp calls each that layers were placed on: "CUDA0"; none where the CPU computes all."""
    notes: tuple[str, ...] = ()
    """One line each: why no GPU is used, what was tried again with less, what the template cannot protect."""


class Engine(Protocol):
    """A loaded model that turns messages into tokens and tokens into more tokens."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def default_sampling(self) -> Sampling:
        """The model's own recommendation (`general.sampling.*`), else the defaults of `Sampling`."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text to be continued, as transformers gives them (with BOS where the model wants it)."""
        ...

    def encode_chat(self, messages: Sequence[Message], *, think: bool | None = None) -> list[int]:
        """Tokens of a conversation up to where the assistant speaks, through the model's own template.

        `think` as in `Sampling`. Raises TemplateError.
        """
        ...

    def chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, *, shift: bool = False
    ) -> Iterator[GenerationChunk]:
        """The assistant's next turn: `generate` of what `encode_chat` gives. None is the model's own sampling.

        With `shift` a full context does not end the reply: the oldest tokens after the system prompt go, and what
        stays is moved to their place, where the model allows it (`stats.shifted_tokens`).
        Raises TemplateError, ContextOverflow, GenerationError.
        """
        ...

    def generate(self, tokens: Sequence[int], sampling: Sampling | None = None) -> Iterator[GenerationChunk]:
        """Continue `tokens`. Raises ContextOverflow, GenerationError, at once or while it is iterated.

        One at a time: exhaust or close the iterator before the next call (or see `LoadOptions.when_busy`). What was
        computed before of the beginning of `tokens` is not computed again (`stats.cached_tokens`).
        """
        ...

    def cancel(self) -> None:
        """Stop a running `generate` soon, from any thread; it ends with finish_reason "cancelled"."""
        ...

    def close(self) -> None: ...


class LoadedEngine(Engine, Protocol):
    """What `runner.engine.start.load` gives: to be closed, or used in a `with` block."""

    def speeds(self, *, prompt: int, generate: int, depths: Sequence[int], rounds: int) -> Iterator[Speed]:
        """How fast it is, as `runner.bench.measure` has it; nothing else may run meanwhile. Raises GenerationError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class LoadOptions:
    """What a person may set. None: chosen by the runner."""

    context: int | Literal["auto"] | None = None
    """Tokens. None: as many as the model knows and memory holds; "auto": fewer, too, if then more fits a GPU."""
    gpu_layers: int | Literal["auto", "all"] = "auto"
    threads: int | None = None
    batch_threads: int | None = None
    """Threads for prompts. None: as `threads`."""
    batch: int | None = None
    """Tokens of a prompt that are computed at once."""
    flash_attention: bool | None = None
    vram: int | None = None
    """Bytes of each GPU that may be used at most."""
    reserve: int | None = None
    """Bytes of each GPU to leave for others."""
    parse_special: bool = False
    repack: bool = True
    """Lay weights out anew where the CPU computes faster so: more private memory, other rounding."""
    verbose: bool = False
    kv_types: tuple[str, str] | Literal["auto"] = ("f16", "f16")
    """What the numbers of the KV cache are kept as: K, V. See `runner.placement.KV_TYPES`. "auto": f16, or less
    if then more fits a GPU."""
    when_busy: Literal["refuse", "wait"] = "refuse"
    """What happens to who wants a reply while another is generated."""
    cache: int | None = None
    """Bytes of disk for what was computed of long prompts; 0 for none."""
    speculate: bool = True
    """Guess tokens from the context and check several at once, where that is quicker."""
    workers: tuple[str, ...] = ()
    """`host:port` of machines whose devices are used too."""
    draft: Path | None = None
    """A smaller model of the same vocabulary that guesses instead."""
    loras: tuple[tuple[Path, float], ...] = ()
    """LoRA adapters in GGUF form, each with what its part is multiplied by."""


LoadProgress = Callable[[float], None]
"""Called with 0.0 to 1.0 while the weights are read."""
