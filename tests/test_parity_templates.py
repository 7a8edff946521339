"""The chat templates that come with llama.cpp's source, of models that people run: each is read, and switched."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from models.errors import TemplateError
from runner.template import ChatTemplate
from runner.thinking import ThoughtMarks, find_marks, switch
from scripts.build_peer import peer_folder
from tests.peer import need_peer

pytestmark = pytest.mark.parity

FOLDER = peer_folder() / "llama.cpp" / "models" / "templates"
MESSAGES = [{"role": "user", "content": "Name a river."}]
OPENS = {
    "Qwen-Qwen3-0.6B": "<think>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<think>",
    "openai-gpt-oss-120b": "<|channel|>analysis<|message|>",
    "google-gemma-4-31B-it": "<|channel>thought\n",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[THINK]",
    "ByteDance-Seed-OSS": "<seed:think>",
    "MiniMax-M3": "<mm:think>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_THINKING|>",
    "Apertus-8B-Instruct": "<|inner_prefix|>",
    "meta-llama-Llama-3.1-8B-Instruct": None,
    "google-gemma-2-2b-it": None,
}
SWITCHED = (
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "GLM-4.6",
    "HuggingFaceTB-SmolLM3-3B",
    "deepseek-ai-DeepSeek-V3.1",
    "google-gemma-4-31B-it",
    "ByteDance-Seed-OSS",
    "MiniMax-M3",
    "Cohere2MoE",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
    "ibm-granite-granite-3.3-2B-Instruct",
    "inclusionai-ling-3.0-flash",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Apertus-8B-Instruct",
)
"""Templates whose prompt with thinking is another than without."""
FOR_TOOLS = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
}
"""Templates that are for conversations with tools only."""


@pytest.fixture(autouse=True)
def peer() -> None:
    need_peer()


def template(name: str) -> ChatTemplate:
    path = FOLDER / f"{name}.jinja"
    return ChatTemplate(path.read_text(encoding="utf-8"), bos="<s>", eos="</s>")


def test_every_template_renders_or_says_why_not() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.jinja"))
    assert len(names) > 50
    refused = set()
    for name in names:
        try:
            assert "Name a river." in template(name).render(MESSAGES)
        except TemplateError:
            refused.add(name)
    assert refused == FOR_TOOLS


@pytest.mark.parametrize("name", OPENS)
def test_the_marks_of_a_thought_are_found(name: str) -> None:
    marks: ThoughtMarks | None = find_marks(template(name).source)
    assert (marks.opens if marks else None) == OPENS[name]


@pytest.mark.parametrize("name", SWITCHED)
def test_thinking_is_switched(name: str) -> None:
    found = template(name)
    reads: Callable[[str], bool] = found.reads
    on, off = (found.render(MESSAGES, switch(found.source, reads, think)) for think in (True, False))
    assert on != off
    assert found.render(MESSAGES) in (on, off) or name == "MiniMax-M3"  # which leaves it to the model by itself
